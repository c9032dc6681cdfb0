"""Whole models with the runner and with Python: bit-equal, and alike in all that can be seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from splitpoint import Config, compile, kernels
from splitpoint.runtime.native_library import program_type
from tests import tiny

Runner = Any

CONFIG: dict[str, Any] = {"max_size": 2048, "compile_sizes": [1], "linear": "inductor"}


@pytest.fixture(autouse=True)
def _needs_the_runner() -> None:
    if program_type() is None:
        pytest.skip("the runner needs a C++ compiler and Python's headers")


def code(compiled: Any, size: int) -> str:
    """What a call of a size runs."""
    program = compiled._program
    text: str = program.runners[program.dispatches[0].table[size]].__doc__
    return text


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One model: native compiled now, native from the store, Python from the store."""
    model, folder = tiny.model(), str(tmp_path_factory.mktemp("store"))
    made = {}
    for name, runner in (("cold", "native"), ("warm", "native"), ("python", "python")):
        config = Config(**CONFIG, runner=runner, cache_dir=folder)
        made[name] = compile(model, config, dynamic_dims={"input_ids": 1})
        made[name](**ids(3))
    assert made["cold"].stats().compilations > 0
    assert made["warm"].stats().compilations == made["python"].stats().compilations == 0
    return {**made, "module": model}


def ids(size: int) -> dict[str, Any]:
    numbers = torch.randint(tiny.VOCABULARY, (1, size))
    return {"input_ids": numbers, "use_cache": False, "logits_to_keep": 1}


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_native_cold_and_warm_are_python_to_the_bit(
    language_models: dict[str, Any], size: int
) -> None:
    given = ids(size)
    want = language_models["python"](**given).logits
    for name in ("cold", "warm"):
        for _ in range(2):
            assert torch.equal(language_models[name](**given).logits, want)
        assert code(language_models[name], size).count("n0(size") == 1
        assert "p_" not in code(language_models[name], size)
    assert "n0(" not in code(language_models["python"], size)
    reference = language_models["module"](**given).logits
    torch.testing.assert_close(want, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "state", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda s: s.__name__
)
def test_outputs_are_alike_in_every_gradient_mode(
    language_models: dict[str, Any], state: Callable[[], Any]
) -> None:
    given = ids(4)
    with state():
        want, got = (language_models[name](**given).logits for name in ("python", "warm"))
    assert torch.equal(want, got)
    assert want.requires_grad == got.requires_grad
    assert want.is_inference() == got.is_inference()
    assert type(want.grad_fn) is type(got.grad_fn)


def test_memory_is_freed_as_early_as_in_python(language_models: dict[str, Any]) -> None:
    def peak(name: str) -> int:
        given = ids(2048)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            language_models[name](**given)
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    kept = 1 << 20  # what a program may keep for its next steps
    wanted = peak("python")
    assert 4 * kept < wanted
    assert 0 < peak("warm") <= wanted + kept


def test_threads_get_their_own_results(language_models: dict[str, Any]) -> None:
    given = [ids(size) for size in (1, 3, 8, 8)]
    want = [language_models["python"](**each).logits for each in given]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(30):
            if not torch.equal(language_models["warm"](**given[index]).logits, want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_stay_what_they_are_in_later_calls(language_models: dict[str, Any]) -> None:
    kept, wanted = [], []
    for state in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with state():
            for size in (3, 3, 3, 1, 8, 3):
                given = ids(size)
                kept.append(language_models["warm"](**given).logits)
                wanted.append(language_models["python"](**given).logits)
                assert kept[-1].is_inference() == (state is torch.inference_mode)
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))


def test_weights_that_are_replaced_are_followed(language_models: dict[str, Any]) -> None:
    given, module = ids(3), language_models["module"]
    layer = module.model.layers[1].mlp.down_proj
    before = layer.weight
    try:
        layer.weight = torch.nn.Parameter(before * 2, requires_grad=False)
        want = language_models["python"](**given).logits
        assert torch.equal(language_models["warm"](**given).logits, want)
    finally:
        layer.weight = before
    assert not torch.equal(language_models["warm"](**given).logits, want)


def test_a_dispatch_mode_sees_what_it_sees_of_python(language_models: dict[str, Any]) -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    given, seen = ids(3), {}
    for name in ("python", "warm"):
        with Seen() as mode:
            language_models[name](**given)
        seen[name] = mode.names
    assert seen["warm"] == seen["python"]
    assert any("attention" in name for name in seen["python"])


# --- other models ----------------------------------------------------------------------


def both(model: Any, **options: Any) -> tuple[Any, Any]:
    """The model compiled with the runner, and then, from the store, with Python."""
    config: dict[str, Any] = {"max_size": 8, "linear": "inductor", **options}
    return compile(model, Config(**config)), compile(model, Config(**config, runner="python"))


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("runner_native", "DEF") as made:
        yield made


def test_what_the_runner_does_not_know_runs_between_its_programs(
    library: torch.library.Library,
) -> None:
    library.define("halves(Tensor x) -> (Tensor, Tensor)")
    library.define("twice(Tensor x, *, float by=2.0) -> Tensor")
    library.impl("halves", lambda x: (x[:, :2].clone(), x[:, 2:].clone()), "CPU")
    library.impl("twice", lambda x, by=2.0: x * by, "CPU")
    torch.library.register_fake(
        "runner_native::halves", lambda x: (x[:, :2].clone(), x[:, 2:].clone()), lib=library
    )
    torch.library.register_fake("runner_native::twice", lambda x, by=2.0: x * by, lib=library)

    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right = torch.ops.runner_native.halves(x.cumsum(1) + 1)
        y = torch.ops.runner_native.twice(left * right, by=0.5)
        return torch.sort(y, 1)[0] + 1, x, x[:, :2]

    fast, plain = both(
        model, splitting_ops=["runner_native::halves", "runner_native::twice"], cache_dir=""
    )
    for size in (3, 1, 8):
        x = torch.randn(size, 4)
        got, want = fast(x), plain(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert got[1] is x
        assert got[2].data_ptr() == x.data_ptr()
    lines = code(fast, 3)
    assert "n0(size, a0)" in lines
    assert "n1(size" in lines
    assert "n2(size" not in lines  # the second splitting op is in the second program


class Packed(torch.nn.Module):
    """Linear layers of one x, gated, with a residual and with a bias, of an odd number of rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = {"q": (33, 40), "k": (33, 64), "gate": (40, 65), "up": (40, 65), "down": (65, 33)}
        for name, (k, n) in sizes.items():
            self.add_module(name, torch.nn.Linear(k, n, bias=False))
        self.biased = torch.nn.Linear(33, 7)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k = self.q(x), self.k(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(q)) * self.up(q))
        return self.biased(x), k, k.view(-1, 8, 8).transpose(0, 1), self.q(x).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_layers_are_python_to_the_bit(dtype: torch.dtype) -> None:
    fast, plain = both(Packed(dtype), linear={"1-8": "packed"}, compile_sizes=[1], cache_dir="")
    kept = []
    for size in (3, 1, 3, 8, 3):
        x = torch.randn(size, 33).to(dtype)
        kept += [(fast(each), plain(each)) for each in (x, x + 1)]
        assert code(fast, size).count("n0(size") == 1
    for got, want in kept:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    x = torch.randn(3, 33).to(dtype)
    seen = [kernels_in_profile(call, x) for call in (fast, plain)]
    assert seen[0] == seen[1] > 0


def kernels_in_profile(call: Any, x: torch.Tensor) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call(x)
    return sum(event.name == "splitpoint::linear_packed" for event in profile.events())


class Counting(torch.nn.Module):
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.table = torch.nn.Embedding(10, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.sum(0))
        return self.table(at) * self.seen


def test_a_buffer_is_updated_in_place_and_a_bad_index_is_the_same_error() -> None:
    fast, plain = Counting(), Counting()
    plain.load_state_dict(fast.state_dict())
    options: dict[str, Any] = {"max_size": 8, "linear": "inductor"}
    calls = [
        compile(fast, Config(**options)),
        compile(plain, Config(**options, runner="python")),
    ]
    for size in (3, 1, 7):
        x, at = torch.randn(size, 4), torch.randint(10, (size,))
        version = fast.seen._version
        got, want = (call(x, at) for call in calls)
        assert torch.equal(got, want)
        assert torch.equal(fast.seen, plain.seen)
        assert fast.seen._version > version
    assert "n0(" in code(calls[0], 3)
    messages = []
    for call in calls:
        with pytest.raises(RuntimeError, match="out of bounds") as error:
            call(torch.randn(2, 4), torch.tensor([1, 77]))
        assert type(error.value) is RuntimeError
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_without_a_compiler_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_loaded", [])
    monkeypatch.setattr(kernels.build, "cpp_compiler", lambda: None)
    compiled = compile(lambda x: x.cumsum(1) + 1, Config(max_size=8, linear="inductor"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), x.cumsum(1) + 1)
    assert "n0(" not in code(compiled, 3)
