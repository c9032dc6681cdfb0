"""Tensors that overlap in memory while one is updated: right as in eager, or refused."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitpoint import Config, compile
from splitpoint.errors import InputError, OverlappingMemory, StateChanged, UnsupportedGraph
from splitpoint.graph.overlap import _PATIENCE, Place, _cross, place_of, share_memory

EAGER = Config(max_size=16, split_points=[4], backend="eager", cache_dir="")
NATIVE = Config(max_size=16, cache_dir="", linear="inductor")
RUNNERS = [EAGER, NATIVE, Config(max_size=16, cache_dir="", linear="inductor", runner="python")]


def indices(tensor: torch.Tensor) -> set[int]:
    """The elements of its memory that a tensor is in."""
    ranges = [
        [n * step for n in range(size)]
        for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return {tensor.storage_offset() + sum(each) for each in itertools.product(*ranges)}


def overlap(*tensors: torch.Tensor) -> bool:
    return any(indices(a) & indices(b) for a, b in itertools.combinations(tensors, 2))


# --- whether two tensors share memory --------------------------------------------------

LAYOUTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=4)


@settings(max_examples=500, deadline=None)
@given(LAYOUTS, st.integers(0, 40), st.sampled_from([1, 2, 4]), LAYOUTS, st.sampled_from([1, 2, 4]))
def test_two_layouts_share_memory_where_their_bytes_do(first, ahead, wide, second, other_wide):
    def place(start: int, itemsize: int, dims: list[tuple[int, int]]) -> tuple[Place, set[int]]:
        ranges = [[i * step * itemsize for i in range(n)] for n, step in dims]
        taken = {start + sum(each) for each in itertools.product(*ranges, range(itemsize))}
        shape, strides = tuple(n for n, _ in dims), tuple(step for _, step in dims)
        return Place(start, itemsize, shape, strides), taken

    a, bytes_of_a = place(100, wide, first)
    b, bytes_of_b = place(100 + ahead, other_wide, second)
    assert share_memory(a, b) == share_memory(b, a) == bool(bytes_of_a & bytes_of_b)
    if bytes_of_a:
        assert max(bytes_of_a) == a.end - 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (lambda x: x[:, ::2], lambda x: x[:, 1::2], False),
        (lambda x: x[:, :32], lambda x: x[:, 32:], False),
        (lambda x: x[::2], lambda x: x[1::2], False),
        (lambda x: x.view(100, 4, 16)[:, 1], lambda x: x.view(100, 4, 16)[:, 2:], False),
        (lambda x: x[:, ::2], lambda x: x[:, ::3], True),
        (lambda x: x[:50], lambda x: x[49:], True),
        (lambda x: x[:0], lambda x: x, False),
        (lambda x: x.view(torch.int16)[:, ::2], lambda x: x.view(torch.int16)[:, 1::2], False),
        (lambda x: x.view(torch.int16)[:, 1::2], lambda x: x, True),
        (lambda x: x[0, 0], lambda x: x[99, 63], False),
        (lambda x: x.t(), lambda x: x[3:4], True),
    ],
)
def test_usual_views_are_told_apart(first, second, expected):
    x = torch.zeros(100, 64)
    places = [place_of(each(x)) for each in (first, second)]
    assert (all(places) and share_memory(*places)) == expected


def test_layouts_that_are_hard_to_tell_apart_count_as_overlapping():
    # Multiples of three primes that lie as close as a sum of them can.
    primes = (10_007, 10_009, 10_037)
    a = Place(0, 1, (400, 400, 400), primes)
    begun = time.thread_time()
    assert share_memory(a, Place(1, 1, (400,), (10_039,)))
    assert time.thread_time() - begun < 20 * _PATIENCE * 1e-6


# --- arguments -------------------------------------------------------------------------


def writes_first(x, y):
    x.add_(1)
    return y * 2


def writes_second(x, y):
    z = x * 2
    y.mul_(3)
    return z + x


def writes_both(x, y):
    x.add_(1)
    y.mul_(2)
    return x + y


def writes_through_views(x, y):
    x.view(-1)[::2].add_(1)
    x.t().copy_(y.t() + x.t())
    return y + 1


def writes_none(x, y):
    return x * 2 + y


WRITERS = [writes_first, writes_second, writes_both, writes_through_views]
BUFFER = 96
COMPILED: dict[Any, Any] = {}


def compiled_once(function: Callable[..., Any], config: Config) -> Any:
    """The same one for all examples of a test: a call must not depend on the one before."""
    key = (function, config.backend, config.runner)
    if key not in COMPILED:
        COMPILED[key] = compile(function, config)
        COMPILED[key](torch.zeros(3, 4), torch.zeros(3, 4))
    return COMPILED[key]


MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("config", RUNNERS, ids=lambda c: f"{c.backend}-{c.runner}")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([*WRITERS, writes_none]),
    st.integers(1, 8),
    st.tuples(st.integers(0, 64), st.integers(0, 64)),
    st.booleans(),
    st.sampled_from(MODES),
)
def test_views_of_one_buffer_are_right_or_refused(config, function, size, starts, same, mode):
    compiled = compiled_once(function, config)
    with mode():
        buffer = torch.arange(float(BUFFER))
        copy = buffer.clone()

        def views(of: torch.Tensor) -> list[torch.Tensor]:
            made = [of[start : start + 4 * size].view(size, 4) for start in starts]
            return made[:1] * 2 if same else made

        refused = function is not writes_none and overlap(*views(buffer))
        if refused:
            with pytest.raises(OverlappingMemory, match="x") as caught:
                compiled(*views(buffer))
            assert "y" in str(caught.value)
            assert str(caught.value).count("\n") < 3
            assert isinstance(caught.value, InputError)
        else:
            expected = function(*views(copy))
            assert torch.equal(compiled(*views(buffer)), expected)
        assert torch.equal(buffer, copy)  # a refused call changes nothing


@pytest.mark.parametrize("function", [writes_first, writes_second, writes_both])
@pytest.mark.parametrize("step", [2, 3])
def test_interleaved_views_are_served(function, step):
    compiled = compile(function, EAGER)
    pairs = [[b[:, :4], b[:, 4:]] for b in (torch.zeros(5, 8), torch.zeros(5, 8))]
    if step == 3:
        pairs = [[b[:, 0], b[:, 2]] for b in (torch.zeros(5, 3, 4), torch.zeros(5, 3, 4))]
    for pair in pairs:
        for each in pair:
            each.copy_(torch.arange(20.0).view(5, 4))
    assert torch.equal(compiled(*pairs[0]), function(*pairs[1]))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    with pytest.raises(OverlappingMemory):
        compiled(pairs[0][0], pairs[0][0])


@pytest.mark.parametrize("count", [3, 9])
def test_many_arguments(count):
    def f(x, *rest):
        x.add_(1)
        rest[-1].mul_(2)
        return sum(rest, x)

    compiled = compile(f, EAGER)
    buffer = torch.randn(count, 5, 4)
    copy = buffer.clone()
    args = list(buffer.unbind())
    torch.testing.assert_close(compiled(*args), f(*copy.unbind()))
    assert torch.equal(buffer, copy)
    compiled(args[0], *[args[1]] * (count - 2), args[-1])  # what only is read may be the same
    for first, second in itertools.permutations(range(count), 2):
        if {first, second} & {0, count - 1}:
            given_ = list(args)
            given_[first] = given_[second]
            with pytest.raises(OverlappingMemory):
                compiled(*given_)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8), st.booleans()), max_size=7))
def test_stretches_of_memory_that_meet_are_found(stretches):
    spans = [(start, start + length, updated) for start, length, updated in stretches]
    pairs = itertools.combinations(spans, 2)
    expected = any(a[0] < b[1] and b[0] < a[1] and (a[2] or b[2]) for a, b in pairs)
    assert _cross(list(spans)) == expected


def test_arguments_inside_containers_are_named_by_their_path():
    def f(batch, x):
        batch["a"][0].add_(1)
        return batch["a"][1] + x

    compiled = compile(f, EAGER)
    one, two, x = torch.zeros(5, 4), torch.zeros(5, 4), torch.zeros(5, 4)
    compiled({"a": [one, two]}, x)
    with pytest.raises(OverlappingMemory, match=r"batch\['a'\]\[0\].*batch\['a'\]\[1\]\.clone\(\)"):
        compiled({"a": [one, one]}, x)


def test_a_graph_that_updates_nothing_checks_nothing():
    compiled = compile(writes_none, EAGER)
    compiled(torch.zeros(5, 4), torch.zeros(5, 4))
    for lane in compiled._program.lanes:
        assert lane.body.updates is None
        assert "data_ptr" not in lane.run.__doc__


def test_other_dtypes_and_empty_arguments():
    def f(x, y, z):
        x.add_(1)
        return x.sum() + y.sum() + z.sum()

    compiled = compile(f, EAGER, dynamic_dims={"x": 0, "y": 0})
    buffer = torch.zeros(20, 4, dtype=torch.int32)
    compiled(torch.zeros(5, 4), buffer[:5], buffer[5:, :0])
    floats = buffer.view(torch.float32)
    compiled(floats[:5], buffer[5:10], buffer[5:, :0])
    with pytest.raises(OverlappingMemory):
        compiled(floats[:5], buffer[4:9], buffer[5:, :0])


def test_splitting_ops_that_update():
    compiled = compile(writes_first, Config(**SPLIT))
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(compiled(x.clone(), y), writes_first(x, y))
    with pytest.raises(OverlappingMemory):
        compiled(y, y)


SPLIT = {
    "max_size": 16,
    "backend": "eager",
    "cache_dir": "",
    "splitting_ops": ["aten::add_", "aten::mul"],
}


# --- the module's tensors --------------------------------------------------------------


class Cache(torch.nn.Module):
    """Updates a buffer; another one and a weight are read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(16, 4))
        self.register_buffer("scale", torch.ones(4))
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0), requires_grad=False)

    def forward(self, x, y):
        self.cache[: x.shape[0]].add_(x)
        return y * self.weight + self.scale + self.cache.sum(0)


class Argument(Cache):
    """Updates an argument."""

    def forward(self, x, y):
        x.add_(y)
        return x * self.weight + self.scale + self.cache[0]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 4), torch.randn(5, 4)


def agrees(compiled: Any, module: torch.nn.Module, reference: torch.nn.Module) -> None:
    for size in (5, 1, 9):
        x, y = torch.randn(size, 4), torch.randn(size, 4)
        torch.testing.assert_close(compiled(x.clone(), y), reference(x, y))
        for one, other in zip(module.buffers(), reference.buffers(), strict=True):
            assert torch.equal(one, other)


CONFIGS = [
    *RUNNERS,
    Config(max_size=16, backend="eager", cache_dir="", module_guards="first_call"),
    Config(max_size=16, cache_dir="", linear="inductor", lazy=True),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mode", MODES)
def test_an_argument_that_is_a_view_of_what_the_module_updates(config, mode):
    module, reference = Cache(), Cache()
    compiled = compile(module, config)
    with mode():
        agrees(compiled, module, reference)
        module.cache.zero_(), reference.cache.zero_()
        x, y = pair()
        for args in ((module.cache[5:10], y), (x, module.cache[11:])):
            with pytest.raises(OverlappingMemory, match=r"the module's cache.*\b[xy]\.clone"):
                compiled(*args)
            assert not module.cache.any()
        # What only is read may be the module's own.
        rows = module.scale.expand(5, 4).clone()
        torch.testing.assert_close(compiled(x, rows), reference(x, rows))


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_an_argument_that_is_updated_and_a_view_of_what_the_module_holds(config):
    module, reference = Argument(), Argument()
    compiled = compile(module, config)
    agrees(compiled, module, reference)
    with pytest.raises(OverlappingMemory, match=r"x, which the model updates.*the module's cache"):
        compiled(module.cache[:5], torch.randn(5, 4))
    args = torch.randn(5, 4), module.cache[:5]
    torch.testing.assert_close(compiled(args[0].clone(), args[1]), reference(*args))


class Views(torch.nn.Module):
    """Updates a view of a buffer and reads others."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.zeros(16, 4))
        self.register_buffer("head", self.whole[:8])
        self.register_buffer("tail", self.whole[6:])
        self.register_buffer("other", torch.ones(4))

    def forward(self, x):
        self.head[: x.shape[0]].add_(x)
        y = self.tail.sum(0) + self.whole.mean() + self.other
        self.tail.mul_(0.5)
        return x + y + self.head.sum(0)


@pytest.mark.parametrize("config", CONFIGS)
def test_buffers_that_overlap_at_capture_are_followed_and_held_to_it(config):
    module, reference = Views(), Views()
    compiled = compile(module, config)

    def same(*sizes: int) -> None:
        for size in sizes:
            x = torch.randn(size, 4)
            torch.testing.assert_close(compiled(x), reference(x))
            assert torch.equal(module.whole, reference.whole)

    same(5, 1, 8)
    if config.module_guards == "first_call":
        return
    for each in (module, reference):  # others that lie to each other as those did
        each.whole = torch.ones(16, 4)
        each.head, each.tail = each.whole[:8], each.whole[6:]
    same(5, 1, 8)
    kept = module.whole, module.head, module.tail, module.other
    memory = torch.ones(20, 4)
    for name, tensor in {
        "whole": torch.ones(16, 4),
        "head": torch.ones(8, 4),
        "tail": module.whole.as_strided((10, 4), (4, 1), 20),
        "other": module.whole[3],
    }.items():
        setattr(module, name, tensor)
        for _ in range(2):
            with pytest.raises(StateChanged, match=rf"the module's {name}.*overlap.*reset"):
                compiled(torch.randn(5, 4))
        module.whole, module.head, module.tail, module.other = kept
        same(5)
    module.whole.data = memory[:16]
    with pytest.raises(StateChanged, match="overlap"):
        compiled(torch.randn(5, 4))
    module.head.data, module.tail.data = memory[:8], memory[6:16]
    reference.whole.copy_(module.whole)
    same(5)


@pytest.mark.parametrize("watched", [True, False])
def test_memory_that_is_exchanged_is_followed(watched, monkeypatch):
    if not watched:  # as on versions of Python without the means
        monkeypatch.setattr("splitpoint.capture.watch.have_addresses", lambda: False)
    module, reference = Cache(), Cache()
    compiled = compile(module, EAGER)
    agrees(compiled, module, reference)
    assert (compiled._program.lanes[0].graph.state.watch is not None) == watched
    before, now = module.cache.data, module.cache.clone()
    module.cache.data = now
    x, y = pair()
    torch.testing.assert_close(compiled(x, y), reference(x, y))
    with pytest.raises(OverlappingMemory):
        compiled(now[:5], y)
    expected = reference(before[:5].clone(), y)
    torch.testing.assert_close(compiled(before[:5], y), expected)
    module.scale.data = now[3]
    for _ in range(2):
        with pytest.raises(StateChanged, match="overlap"):
            compiled(x, y)


def test_buffers_that_are_views_without_the_whole_are_refused_where_they_overlap():
    class Scattered(torch.nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            memory = torch.zeros(20, 4)
            self.register_buffer("one", memory[:8])
            self.register_buffer("two", memory[first : first + 8])

        def forward(self, x):
            self.one[: x.shape[0]].add_(x)
            return x + self.two.sum(0)

    with pytest.raises(UnsupportedGraph, match="overlap in memory"):
        compile(Scattered(7), EAGER)(torch.randn(5, 4))
    module, reference = Scattered(8), Scattered(8)  # side by side
    compiled = compile(module, EAGER)
    for size in (5, 2):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x), reference(x))
    module.two = torch.ones(8, 4)  # may lie anywhere else
    x = torch.randn(5, 4)
    reference.two = torch.ones(8, 4)
    torch.testing.assert_close(compiled(x), reference(x))
    module.two = module.one
    with pytest.raises(StateChanged):
        compiled(x)


def test_interleaved_buffers():
    class Interleaved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.zeros(8, 2, 4)
            self.register_buffer("keys", memory[:, 0])
            self.register_buffer("values", memory[:, 1])

        def forward(self, x):
            self.keys[: x.shape[0]].add_(x)
            self.values[: x.shape[0]].sub_(x)
            return x + self.values.sum(0) * self.keys.sum(0)

    module, reference = Interleaved(), Interleaved()
    compiled = compile(module, EAGER)
    for size in (5, 2):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x), reference(x))


def test_weights_that_share_memory_do_not_hinder_an_update_of_another_buffer():
    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.ones(6, 4)
            self.register_buffer("q", memory[:4])
            self.register_buffer("k", memory[2:])
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x @ self.q.t() @ self.k + self.count

    module = Fused()
    compiled = compile(module, EAGER)
    x = torch.randn(5, 4)
    torch.testing.assert_close(compiled(x), x @ module.q.t() @ module.k + 1)
    module.k = torch.zeros(4, 4)  # not updated: need not lie where it did
    torch.testing.assert_close(compiled(x), torch.full((5, 4), 2.0))


def test_buffers_over_memory_that_torch_does_not_know_to_be_shared():
    numpy = pytest.importorskip("numpy")
    memory = numpy.zeros((8, 4), dtype="float32")

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.from_numpy(memory))
            self.register_buffer("two", torch.from_numpy(memory))

        def forward(self, x):
            self.one[: x.shape[0]].add_(x)
            return x + self.two.sum(0)

    with pytest.raises(UnsupportedGraph, match="not views of one tensor"):
        compile(Foreign(), EAGER)(torch.randn(5, 4))
    array = numpy.zeros((5, 4), dtype="float32")
    compiled = compile(writes_first, EAGER)
    compiled(*pair())
    with pytest.raises(OverlappingMemory):
        compiled(torch.from_numpy(array), torch.from_numpy(array))


def test_tensors_that_a_function_closes_over():
    state, other = torch.zeros(16, 4), torch.ones(4)

    def f(x):
        state[: x.shape[0]].add_(x)
        return state.sum(0) + other

    compiled = compile(f, EAGER)
    x = torch.randn(5, 4)
    torch.testing.assert_close(compiled(x), x.sum(0) + 1)
    with pytest.raises(OverlappingMemory, match=r"a tensor \[16, 4\] that the model holds"):
        compiled(state[3:8])
    other = state[2]
    with pytest.raises(StateChanged, match="overlap"):
        compiled(x)


# --- warm starts, background, torch.compile --------------------------------------------


def started(module: torch.nn.Module, folder: Any, runner: str, *args: torch.Tensor) -> Any:
    config = Config(
        max_size=16, split_points=[8], linear="inductor", runner=runner, cache_dir=str(folder)
    )
    compiled = compile(module, config)
    compiled(*args)
    return compiled


@pytest.mark.parametrize("runner", ["native", "python"])
def test_a_warm_start_refuses_the_same(tmp_path, runner):
    for loads in (0, 2):
        module, reference = Cache(), Cache()
        compiled = started(module, tmp_path, runner, *pair())
        assert compiled.stats().loads == loads
        module.cache.zero_()
        agrees(compiled, module, reference)
        with pytest.raises(OverlappingMemory, match=r"the module's cache.*x\.clone"):
            compiled(module.cache[5:10], torch.randn(5, 4))
        module.scale = module.cache[3]
        with pytest.raises(StateChanged, match=r"the module's (cache|scale).*overlap"):
            compiled(*pair())


def test_a_warm_start_keeps_how_buffers_overlap(tmp_path):
    for loads in (0, 1):  # sizes above 8 are refused by the model
        module, reference = Views(), Views()
        compiled = started(module, tmp_path, "native", x := torch.randn(5, 4))
        reference(x)
        assert compiled.stats().loads == loads
        x = torch.randn(5, 4)
        torch.testing.assert_close(compiled(x), reference(x))
        module.tail = module.whole.as_strided((10, 4), (4, 1), 20)
        with pytest.raises(StateChanged, match=r"the module's tail.*overlap"):
            compiled(x)


def test_buffers_that_overlap_otherwise_are_another_program(tmp_path, caplog):
    caplog.set_level("INFO", "splitpoint")
    started(Views(), tmp_path, "native", torch.randn(5, 4))
    for tail in (lambda m: m.whole.as_strided((10, 4), (4, 1), 20), lambda m: torch.zeros(10, 4)):
        module, reference = Views(), Views()
        module.tail, reference.tail = tail(module), tail(reference)
        x = torch.randn(5, 4)
        compiled = started(module, tmp_path, "native", x)
        reference(x)
        assert compiled.stats().compilations == 1
        assert compiled.stats().captures == 1
        torch.testing.assert_close(compiled(x), reference(x))
        assert torch.equal(module.whole, reference.whole)
    assert "does not fit" not in caplog.text  # the key says so already


def test_a_warm_start_looks_at_the_memory_itself(tmp_path, caplog):
    numpy = pytest.importorskip("numpy")
    caplog.set_level("INFO", "splitpoint")
    started(Cache(), tmp_path, "native", *pair())
    memory = numpy.zeros((16, 4), dtype="float32")
    module = Cache()
    module.cache, module.scale = torch.from_numpy(memory), torch.from_numpy(memory[2])
    with pytest.raises(UnsupportedGraph, match="not views of one tensor"):
        started(module, tmp_path, "native", *pair())
    assert "does not fit" in caplog.text


def test_in_the_background_a_call_is_right_or_refused():
    config = Config(max_size=16, split_points=[8], linear="inductor", background=True, cache_dir="")
    compiled = compile(writes_first, config)
    buffer = torch.zeros(10, 4)
    for _ in range(200):
        copy = buffer.clone()
        expected = writes_first(copy[:5], copy[3:8])
        try:
            got = compiled(buffer[:5], buffer[3:8])
        except OverlappingMemory:
            break
        assert torch.equal(got, expected)
        assert torch.equal(buffer, copy)
        compiled.wait()
    else:
        pytest.fail("nothing was compiled")
    compiled.close()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_torch_compile(backend):
    by_dynamo = torch.compile(
        writes_first,
        backend="splitpoint",
        dynamic=False,
        options={"max_size": 16, "backend": backend, "cache_dir": "", "linear": "inductor"},
    )

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return by_dynamo(x, y)

    def right(first: slice, second: slice) -> None:
        buffer = torch.arange(80.0).view(20, 4)
        copy = buffer.clone()
        expected = writes_first(copy[first], copy[second])
        assert torch.equal(run(buffer[first], buffer[second]), expected)
        assert torch.equal(buffer, copy)

    right(slice(0, 5), slice(5, 10))
    right(slice(10, 15), slice(1, 6))
    x = torch.zeros(5, 4)
    for _ in range(2):  # Dynamo tells the same tensor from two, but not whether two overlap
        buffer = torch.zeros(20, 4)
        with pytest.raises(OverlappingMemory, match=r"l_x_.*l_y_"):
            run(buffer[:5], buffer[3:8])
        assert not buffer.any()
        y = x.clone()
        assert torch.equal(run(x, x), writes_first(y, y))
        torch._dynamo.reset()  # and once with overlapping ones first
    right(slice(0, 5), slice(5, 10))


def test_torch_compile_of_a_module_with_buffers_that_overlap():
    module = Views()
    by_dynamo = torch.compile(
        module, backend="splitpoint", options={"max_size": 16, "backend": "eager"}
    )
    with torch.no_grad(), pytest.raises(OverlappingMemory):
        by_dynamo(torch.zeros(5, 4))
