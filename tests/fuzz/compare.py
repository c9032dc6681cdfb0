"""One program, eager beside compiled: what of a call can be told apart."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from splitpoint import Config, compile
from splitpoint.errors import CaptureError, SplitpointError

REFUSED_BY_TORCH = "Inplace update to inference tensor outside InferenceMode is not allowed"

SECONDS = 60
"""How long a call may take, compiling included."""


class Hangs(BaseException):
    """A call took longer than `SECONDS`; no `Exception`, so that nothing swallows it."""


@dataclasses.dataclass
class Report:
    """What came of a program."""

    calls: int = 0
    refusals: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Class and message of each error of the library's own."""
    refused_whole: bool = False
    """Whether it was the model, which other calls would not change."""
    unstable: int = 0
    """Calls whose values eager PyTorch does not determine: rounding of the arguments changes
    them as much."""
    warm_loads: int = 0
    finding: str = ""
    """What differs, with the call; "" when nothing does."""


def check(names: Mapping[str, Any]) -> Report:
    """Compare the model that a program defines with the same model compiled, from an empty store
    and then from the one that this filled."""
    report = Report()
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        for start in ("cold", "warm"):
            eager, ours = names["Model"](), names["Model"]()
            config = Config(**names["CONFIG"], cache_dir=folder)
            options = {"dynamic_dims": names["DIMS"], "max_dims": names["MAX_DIMS"] or None}
            compiled = compile(ours, config, **options)
            calls = names["CALLS"]
            # What is stored must not depend on which call comes first.
            for lengths, mode in calls if start == "cold" else calls[::-1]:
                said = _call(names, report, eager, ours, compiled, lengths, mode)
                if said:
                    report.finding = f"{start} start, lengths {lengths}, {mode}: {said}"
                if said or report.refused_whole:
                    return report
            if start == "warm":
                report.warm_loads = compiled.stats().loads
            compiled.close()
    return report


def _call(
    names: Mapping[str, Any],
    report: Report,
    eager: torch.nn.Module,
    ours: torch.nn.Module,
    compiled: Callable[..., Any],
    lengths: Sequence[int],
    mode: str,
) -> str:
    """Call both; says what differs."""

    def arguments() -> list[Any]:
        with torch.inference_mode(mode in ("inference_mode", "inference_arguments")):
            made: list[Any] = names["arguments"](*lengths)
            return made

    before = _copied(eager)
    given, ours_given = arguments(), arguments()
    with _mode(mode):
        try:
            wanted = eager(*given)
        except Exception:  # noqa: BLE001 - what eager refuses in this mode is not compared
            _restore(eager, before)
            return ""
        report.calls += 1
        try:
            with _within(SECONDS):
                found = compiled(*ours_given)
        except SplitpointError as error:
            report.refusals.append((type(error).__name__, str(error)))
            report.refused_whole = isinstance(error, CaptureError)
            _restore(eager, before)
            if is_cut(compiled):  # what came before the part that refused was run
                _restore(ours, before)
                return ""
            return _changed(arguments(), ours_given, before, ours)
        except Hangs:
            return f"the call took more than {SECONDS} s"
        except RuntimeError as error:
            if REFUSED_BY_TORCH not in str(error):
                return f"{type(error).__name__}: {error}"
            # Which views torch lets be updated depends on how they were made.
            report.refusals.append(("RuntimeError", REFUSED_BY_TORCH))
            report.refused_whole = True
            _restore(eager, before)
            return ""
        except Exception as error:  # noqa: BLE001 - to be reported, whatever it is
            return f"{type(error).__name__}: {error}"
        sides = [_Side(wanted, given, eager), _Side(found, ours_given, ours)]
        said = _structure(wanted, found, "result") or _places(*sides, is_cut(compiled))
        if not said and (said := _values(*sides)) and _is_unstable(names, before, arguments, mode):
            report.unstable += 1
            said = ""
            _restore(ours, dict(state_of(eager)))
            return said
        said = said or _writing(*sides)
    for model in (eager, ours):
        # Both go on from one state, without what was written into results.
        _restore(model, sides[0].state_after)
    return said


def is_cut(compiled: Any) -> bool:
    """Whether torch.compile serves a compiled model, in parts."""
    return any("torch.compile serves this model" in note for note in compiled.plan.notes)


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _mode(mode: str) -> contextlib.AbstractContextManager[Any]:
    if mode == "inference_mode":
        return torch.inference_mode()
    return torch.enable_grad() if mode == "enable_grad" else torch.no_grad()


# --- the state of a module -------------------------------------------------------------


def state_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a program's module, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers(remove_duplicate=False)
    for name, value in vars(model).items():
        if isinstance(value, torch.Tensor):
            yield name, value


def _copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state_of(model)}


def _restore(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in state_of(model):
            tensor.copy_(state[name])


def _changed(
    fresh: Sequence[Any],
    given: Sequence[Any],
    state: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
) -> str:
    """What a refused call changed."""
    for index, (a, b) in enumerate(zip(fresh, given, strict=True)):
        if not torch.equal(a, b):
            return f"a refused call changed argument {index}"
    for name, tensor in state_of(model):
        if not torch.equal(state[name], tensor):
            return f"a refused call changed {name}"
    return ""


# --- results ---------------------------------------------------------------------------


def parts(value: Any) -> list[tuple[str, Any]] | None:
    """What is in a container, with how to reach it; None for a leaf."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", each) for key, each in value.items()]
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return [(f"[{index}]", each) for index, each in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def leaves(value: Any, path: str = "result") -> Iterator[tuple[str, Any]]:
    """The leaves of a result with the paths to them."""
    within = parts(value)
    if within is None:
        yield path, value
    for key, each in within or ():
        yield from leaves(each, path + key)


def _structure(wanted: Any, found: Any, path: str) -> str:
    if hasattr(wanted, "__next__") and hasattr(found, "__next__"):
        return ""
    if type(wanted) is not type(found):
        return f"{path} is a {type(found).__name__}, not a {type(wanted).__name__}"
    inside, ours = parts(wanted), parts(found)
    if inside is None or ours is None:
        if isinstance(wanted, torch.Tensor):
            return _kind(wanted, found, path)
        same = wanted == found or callable(wanted) or hasattr(wanted, "__next__")
        return (
            ""
            if same or isinstance(wanted, torch.nn.Module)
            else f"{path} is {found!r}, not {wanted!r}"
        )
    if [key for key, _ in inside] != [key for key, _ in ours]:
        return f"{path} holds {[k for k, _ in ours]}, not {[k for k, _ in inside]}"
    pairs = zip(inside, ours, strict=True)
    return next((s for (k, a), (_, b) in pairs if (s := _structure(a, b, path + k))), "")


def _kind(wanted: torch.Tensor, found: torch.Tensor, path: str) -> str:
    for name in ("dtype", "shape", "layout", "is_inference"):
        a, b = (getattr(each, name) for each in (wanted, found))
        a, b = (a(), b()) if callable(a) else (a, b)
        if a != b:
            return f"{path} has {name} {b}, not {a}"
    return ""


class _Side:
    """What a call left behind, eager or compiled: arguments, tensors of the module, results."""

    def __init__(self, result: Any, given: Sequence[Any], model: torch.nn.Module) -> None:
        self.known: dict[str, torch.Tensor] = {
            f"argument {index}": each
            for index, each in enumerate(given)
            if isinstance(each, torch.Tensor)
        }
        self.known |= {f"self.{name}": tensor for name, tensor in state_of(model)}
        self.results = {p: each for p, each in leaves(result) if isinstance(each, torch.Tensor)}
        self.state_after = _copied(model)

    @property
    def all(self) -> dict[str, torch.Tensor]:
        return self.known | self.results


def _bytes_of(tensor: torch.Tensor) -> frozenset[int]:
    """The addresses of a tensor's elements."""
    places = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (length, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        along = torch.arange(length) * step
        places += along.view(-1, *[1] * (tensor.dim() - dim - 1))
    start = tensor.data_ptr()
    return frozenset((start + places * tensor.element_size()).flatten().tolist())


def _places(eager: _Side, ours: _Side, cut: bool) -> str:
    """Which results are the same object as, or lie in the memory of, what. torch.compile returns
    equal views of an argument as one object, and so does a model that it had to cut."""
    sides = [{name: _bytes_of(each) for name, each in side.all.items()} for side in (eager, ours)]
    names = list(eager.all)
    for at, path in enumerate(names):
        if path not in eager.results:
            continue
        for other in names[:at]:
            pairs = [(side.all[path], side.all[other]) for side in (eager, ours)]
            same = [a is b for a, b in pairs]
            if same[0] != same[1] and not (cut and same[1] and other in eager.results):
                return f"{path} is {'not ' * same[0]}{other}"
            shared = [bool(side[path] & side[other]) for side in sides]
            if shared[0] != shared[1]:
                return f"{path} lies {'not ' * shared[0]}in the memory of {other}"
            apart = [a.data_ptr() - b.data_ptr() for a, b in pairs]
            if shared[0] and apart[0] != apart[1]:
                return f"{path} starts {apart[1]} bytes after {other}, not {apart[0]}"
            if shared[0] and (said := _strides(pairs[0][0], pairs[1][0])):
                return f"{path}, a view of {other}, has {said}"
    return ""


def _strides(wanted: torch.Tensor, found: torch.Tensor) -> str:
    for length, a, b in zip(wanted.shape, wanted.stride(), found.stride(), strict=True):
        if length > 1 and a != b:
            return f"strides {found.stride()}, not {wanted.stride()}"
    return ""


TOLERANCE = {
    torch.bfloat16: (6e-2, 6e-2),
    torch.float32: (1e-4, 1e-4),
    torch.float64: (1e-6, 1e-6),
}


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same, up to rounding."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    wide, narrow = TOLERANCE[a.dtype]
    return torch.allclose(a.double(), b.double(), rtol=wide, atol=narrow, equal_nan=True)


@torch.no_grad()
def _values(eager: _Side, ours: _Side) -> str:
    for name, wanted in eager.all.items():
        if not same_values(wanted, ours.all[name]):
            return f"{name} is {ours.all[name].tolist()!s:.200}, not {wanted.tolist()!s:.200}"
    return ""


def _writing(eager: _Side, ours: _Side) -> str:
    """Write into one result after the other: what else changes must be the same."""
    for index, path in enumerate(eager.results):
        for side in (eager, ours):
            tensor = side.all[path]
            with torch.no_grad(), contextlib.suppress(RuntimeError):  # expanded, or of inference
                tensor.fill_(index % 2 if tensor.dtype is torch.bool else index + 20)
    said = _values(eager, ours)
    return said and f"after results were written into {said}"


def _is_unstable(
    names: Mapping[str, Any],
    before: Mapping[str, torch.Tensor],
    arguments: Callable[[], list[Any]],
    mode: str,
) -> bool:
    """Whether eager's own results move as much when its inputs are rounded otherwise."""
    sides = []
    for seed in range(4):
        model, given = names["Model"](), arguments()
        _restore(model, before)
        torch.manual_seed(seed)
        if seed:
            with torch.no_grad():
                for each in [*given, *(tensor for _, tensor in state_of(model))]:
                    if each.is_floating_point() and 0 not in each.stride():
                        wide = 1e-2 if each.dtype is torch.bfloat16 else 1e-6
                        each.add_(torch.randn(each.shape).to(each.dtype) * wide)
        sides.append(_Side(model(*given), given, model))
    same = [not _values(sides[0], each) for each in sides[1:]]
    return not all(same)


def compared(names: Mapping[str, Any]) -> Report:
    """`check`, for tests: nothing may differ, and nothing may be refused."""
    report = check(names)
    assert not report.finding, report.finding
    assert not report.refusals, report.refusals[0]
    assert report.calls
    return report
