"""Weights whose memory was given back because every range reads a packed copy of them.

Such a weight keeps its place in the module, its dtype and its shape, but its class says that it is
gone: whatever would compute with it or copy it raises `WeightsFreed`, at its own name. It has its
class again as soon as it is given data, all of it at once.
"""

from __future__ import annotations

import gc
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import WeightsFreed, WeightsInUse
from ..graph.stitch import Body
from ..kernels.devices import device_row
from ..kernels.memory import give_back
from ..torch_internals.tensors import memory_of

_T = TypeVar("_T")

_METADATA = {
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "nbytes"),
    *("itemsize", "_version", "_cdata", "names", "_backward_hooks"),
}
_METHODS = {
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "data_ptr"),
    *("storage_offset", "get_device", "requires_grad_", "__hash__", "__len__"),
}

MATRIX = 2
"""Dimensions of the weights that are freed; what else is packed is small."""


def _answers(func: Callable[..., Any]) -> bool:
    """Whether a function of a tensor says or sets what stands beside its values."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        field = getattr(getattr(func, "__self__", None), "__name__", "")
        return field in _METADATA or field.startswith("is_")
    return name in _METHODS or name.startswith("is_")


def _torch_function(
    cls: type[Tensor],
    func: Callable[..., Any],
    types: Sequence[type],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    plain: Callable[..., Any] = nn.Parameter.__torch_function__
    kwargs = kwargs or {}
    if _answers(func):
        return plain(func, types, args, kwargs)
    target = args[0] if args else None
    if isinstance(target, (FreedParameter, FreedTensor)) and not any(map(is_freed, args[1:])):
        if getattr(func, "__self__", None) is Tensor.data and func.__name__ == "__set__":
            _restore(target)
            return plain(func, types, args, kwargs)
        if func is Tensor.copy_:
            _allocate(target)
            return plain(func, types, args, kwargs)
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = f".{func.__self__.__name__}"  # type: ignore[attr-defined]
    weight = next(filter(is_freed, args), target)
    raise _gone(name, weight)


def _gone(name: str, weight: object) -> WeightsFreed:
    what = f"a weight {list(weight.shape)}" if isinstance(weight, Tensor) else "a weight"
    return WeightsFreed(
        f"{name} needs {what} whose memory was freed, because every compiled range reads a copy "
        f"of it (free_original_weights=True): give it its values again (load_state_dict, copy_, "
        f".data = ...), or compile with free_original_weights=False"
    )


def _set(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.set_`, which torch does not send through `__torch_function__`: new memory, as by
    `.data = ...`."""
    if given := [*filter(is_freed, (*args, *kwargs.values()))]:
        raise _gone("set_", given[0])
    kind = type(weight)
    _restore(weight)
    try:
        return weight.set_(*args, **kwargs)
    except BaseException:
        weight.__class__ = kind
        raise


def _shown(weight: Tensor, *, tensor_contents: Any = None) -> str:
    return f"<freed weight {list(weight.shape)} of {weight.dtype}>"


class FreedParameter(nn.Parameter):
    """A parameter without its values."""

    __torch_function__ = classmethod(_torch_function)
    __repr__ = _shown  # type: ignore[assignment]
    set_ = _set


class FreedTensor(Tensor):
    """A buffer without its values."""

    __torch_function__ = classmethod(_torch_function)
    __repr__ = _shown  # type: ignore[assignment]
    set_ = _set


_FREED: dict[type, type] = {nn.Parameter: FreedParameter, Tensor: FreedTensor}


def is_freed(value: object) -> bool:
    """Whether a value is a weight that was freed."""
    return type(value) is FreedParameter or type(value) is FreedTensor


def check_whole(owner: nn.Module | None) -> None:
    """See that a module has all its weights.

    Raises:
        WeightsFreed: when some were freed; the message names one.
    """
    if owner is None:
        return
    for name, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
        if is_freed(tensor):
            raise WeightsFreed(
                f"the memory of {name} was freed by a model compiled before "
                f"(free_original_weights=True), so the module cannot be captured again: load its "
                f"weights anew (load_state_dict), or compile with free_original_weights=False"
            )


def convert_whole_only(owner: nn.Module) -> None:
    """See that a module with freed weights, or a part of it, is not half converted by `.to()` and
    the like: they would raise at the first freed weight, with others converted before it.

    All of them come to `_apply`, which each module with freed weights is given one of its own.
    """
    for module in owner.modules():
        if "_apply" not in vars(module) and _has_freed(module, True):
            vars(module)["_apply"] = types.MethodType(_apply, module)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    if _has_freed(self, recurse):
        raise WeightsFreed(
            f"{type(self).__name__} cannot be converted or moved, as the memory of some of its "
            f"weights was freed, because every compiled range reads a copy of them "
            f"(free_original_weights=True); nothing was changed: load its weights anew "
            f"(load_state_dict) and convert it then, or compile with free_original_weights=False"
        )
    converted: nn.Module = type(self)._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
    return converted


def _has_freed(module: nn.Module, recurse: bool) -> bool:
    return any(map(is_freed, [*module.parameters(recurse), *module.buffers(recurse)]))


_READERS: Any = WeakTensorKeyDictionary()
"""By weight: the programs, held weakly, that read it without looking at each call. Other programs
of the process have to know, and a tensor that is pickled cannot carry it."""


def reads_unchecked(reader: object, weights: Iterable[Tensor]) -> None:
    """Note that `reader` reads weights, for as long as both live, and does not look whether they
    were freed."""
    for weight in weights:
        _READERS.setdefault(weight, weakref.WeakSet()).add(reader)


def _check_unused(weights: Sequence[Tensor], owner: object) -> None:
    def used() -> list[Tensor]:
        return [each for each in weights if any(r is not owner for r in _READERS.get(each, ()))]

    if used():
        gc.collect()  # a program that nobody has any more is a cycle
    if found := used():
        raise WeightsInUse(
            f"free_original_weights=True cannot free {len(found)} weights (the first is "
            f"{list(found[0].shape)}), because another compiled model of this module has "
            f"module_guards='first_call' and reads them without looking: compile that one with "
            f"module_guards='every_call' or call its reset(), or compile this one with "
            f"free_original_weights=False"
        )


def _restore(weight: Tensor) -> None:
    """Give a freed weight its class again."""
    weight.__class__ = nn.Parameter if isinstance(weight, nn.Parameter) else Tensor


def _allocate(weight: Tensor) -> None:
    """Give a freed weight its class and memory again, but no values."""
    shape, dtype = weight.shape, weight.dtype
    _restore(weight)
    with torch.inference_mode(False), torch.no_grad():
        weight.data = torch.empty(shape, dtype=dtype)


def _values(weight: Tensor) -> Tensor:
    """What stands in for the values: they all lie at one place."""
    worst = float("nan") if weight.is_floating_point() else -1
    return torch.full((1,), worst, dtype=weight.dtype).expand(weight.shape)


def unread(runs: Iterable[tuple[Body, Sequence[Tensor]]], others: Iterable[Tensor]) -> list[Tensor]:
    """The weights that stitched functions read in packed copies only.

    Args:
        runs: what each range does, with the tensors of the module it may read.
        others: what else the module has. A weight that shares its memory with something that
            stays is left alone, as that would give nothing back.
    """
    packed: dict[int, Tensor] = {}
    plain: set[int] = set()
    known: dict[int, Tensor] = {id(each): each for each in others}
    for body, bound in runs:
        known |= {id(each): each for each in bound}
        packed |= {id(bound[index]): bound[index] for index, _ in body.packed}
        plain |= {id(value) for value in body.names.values()}
        plain |= {id(bound[index]) for index in plain_reads(body)}
    candidates = {
        key: weight
        for key, weight in packed.items()
        if key not in plain
        and type(weight) in _FREED
        and weight.dim() == MATRIX
        and weight.is_contiguous()
        and device_row(weight.device).own_kernels
    }
    live = {key: each for key, each in known.items() if not is_freed(each)}
    memory = {key: memory_of(each) for key, each in live.items()}
    kept = {place for key, place in memory.items() if key not in candidates}
    return [weight for key, weight in candidates.items() if memory[key] not in kept]


def plain_reads(body: Body) -> set[int]:
    """Which tensors of the module a stitched function reads as they are."""
    return {int(index) for line in body.lines for index in _READ.findall(line)}


_READ = re.compile(r"\bw(\d+)\b")
"""How the lines of a body name a tensor of the module as it is."""


class Originals:
    """The weights of one program that were freed.

    Args:
        lock: held while weights do not look freed although they are. Whoever packs weights holds
            it too, or another thread would pack what is not there.
    """

    def __init__(self, lock: AbstractContextManager[bool]) -> None:
        self._weights: dict[int, Tensor] = {}
        self._lock = lock

    @property
    def nbytes(self) -> int:
        """Bytes that were given back and not taken again since."""
        freed = filter(is_freed, self._weights.values())
        return sum(weight.numel() * weight.element_size() for weight in freed)

    def owns(self, weight: Tensor) -> bool:
        """Whether it was freed here."""
        return id(weight) in self._weights

    def free(self, weights: Sequence[Tensor], bound: Iterable[Tensor], reader: object) -> None:
        """Free the memory of weights; of those freed before, go on with those that are bound.
        `reader` is the program that they are of.

        Raises:
            WeightsInUse: when another program reads one and would not notice.
        """
        _check_unused(weights, reader)
        kept = set(map(id, bound))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._weights = {
                key: each for key, each in self._weights.items() if key in kept and is_freed(each)
            }
            for weight in weights:
                weight.data = _values(weight)
                weight.__class__ = _FREED[type(weight)]
                self._weights[id(weight)] = weight
        if weights:
            give_back()

    def around(self, check: Callable[..., _T]) -> Callable[..., _T]:
        """A check of the module to which freed weights look as they were when it was captured."""

        def run(*args: Any) -> _T:
            with self._as_captured():
                return check(*args)

        return run

    @contextmanager
    def _as_captured(self) -> Iterator[None]:
        with self._lock:
            lent = [
                (weight, type(weight), _values(weight))
                for weight in self._weights.values()
                if is_freed(weight)
            ]
            for weight, _, _ in lent:
                _allocate(weight)  # pages that nobody writes to take no memory
            try:
                yield
            finally:
                with torch.inference_mode(False), torch.no_grad():
                    for weight, kind, values in lent:
                        weight.data = values
                        weight.__class__ = kind
