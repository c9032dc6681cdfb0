"""Recorded sizes: what is recorded, in which order, and that replays compute what calls do.

The device is `tests.recording`'s, which replays on CPU; CUDA's has not been run on hardware.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from splitpoint import Config, compile
from splitpoint.errors import InvalidDynamicDims, InvalidField, UnsupportedOnDevice
from splitpoint.runtime.compiled_model import CompiledModel
from tests.recording import Events, on_cpu

WIDTH = 8


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def compiled(function: Callable[..., Any], **kwargs: Any) -> CompiledModel:
    given = {"max_size": 32, "split_points": [8], "backend": "eager", "cache_dir": ""} | kwargs
    dims = given.pop("dynamic_dims", None)
    return compile(function, Config(**given), dynamic_dims=dims)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    return on_cpu(monkeypatch)


def records(events: Events) -> list[tuple[int, int]]:
    return [event[1:] for event in events if event[0] == "record"]


def test_all_are_recorded_at_the_first_call_of_one_largest_first_in_one_pool(events: Events):
    model = mlp()
    fast = compiled(model, compile_sizes=[1], cudagraph_capture_sizes=[2, 16])
    x = torch.randn(20, WIDTH)
    assert_close(fast(x), model(x))
    assert events == []  # not asked for by a size that is not recorded
    assert_close(fast(x[:2]), model(x[:2]))
    assert records(events) == [(16, 1), (2, 1), (1, 1)]
    first = events.index(("record", 16, 1))
    assert events[:first].count("warm up") == 3
    assert [entry.recorded for entry in fast.plan.entries] == [(1,), (2,), (16,)]
    assert "recorded" in str(fast.plan)
    assert fast.stats().replays == 1


def test_compile_sizes_are_recorded_unless_told_otherwise(events: Events):
    x = torch.randn(1, WIDTH)
    compiled(mlp(), compile_sizes=[1])(x)
    assert records(events) == [(1, 1)]
    events.clear()
    compiled(mlp(), compile_sizes=[1], cudagraph_capture_sizes=[])(x)
    assert events == []


@pytest.mark.parametrize("pad", [False, True])
@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sizes=st.lists(st.integers(1, 32), min_size=8, max_size=24), seed=st.integers(0, 999))
def test_calls_of_any_sizes_in_any_order_compute_what_the_model_does(
    events: Events, pad: bool, sizes: list[int], seed: int
):
    """Results of earlier calls stay as they are, however often they are replayed after."""
    torch.manual_seed(seed)
    model = mlp()
    fast = compiled(model, cudagraph_capture_sizes=[1, 4, 7, 16], pad_to_captured=pad)
    calls = [torch.randn(size, WIDTH) for size in sizes]
    results = [fast(x) for x in calls]
    for x, result in zip(calls, results, strict=True):
        assert_close(result.double(), model.double()(x.double()), rtol=1e-5, atol=1e-5)
        model.float()
    recorded = [size for size in sizes if (size <= 16 if pad else size in (1, 4, 7, 16))]
    assert fast.stats().replays == len(recorded)


def test_the_compiled_pieces_are_recorded_too(events: Events):
    """With Inductor's code, the native runner and packed weights in what is not recorded."""
    model = mlp()
    fast = compiled(
        model,
        backend="inductor",
        cudagraph_capture_sizes=[4],
        pad_to_captured=True,
    )
    for size in (3, 4, 9, 2, 4):
        x = torch.randn(size, WIDTH)
        assert_close(fast(x), model(x))
    assert records(events) == [(4, 1)]
    assert "other sizes are padded to the next of 4" in fast.plan.notes


@pytest.mark.parametrize("module_guards", ["every_call", "first_call"])
def test_weights_in_other_memory_are_recorded_anew(events: Events, module_guards: str):
    model = mlp()
    fast = compiled(model, compile_sizes=[4], module_guards=module_guards)
    x = torch.randn(4, WIDTH)
    fast(x)
    with torch.no_grad():
        model[0].weight.mul_(2)  # in place: the recording reads it
    assert_close(fast(x), model(x))
    assert len(records(events)) == 1
    model[0].weight.data = torch.randn(16, WIDTH)
    assert_close(fast(x), model(x))
    assert len(records(events)) == 2
    if module_guards == "every_call":
        model[2].bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        assert_close(fast(x), model(x))
        assert len(records(events)) == 3


def test_sizes_share_memory_for_arguments_of_any_layout(events: Events):
    class Rows(nn.Module):
        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return torch.relu(x).sum(0) + ids[0].unsqueeze(1)

    fast = compiled(
        Rows(),
        cudagraph_capture_sizes=[2, 6],
        dynamic_dims={"ids": 1, "x": 1},
    )
    for size in (6, 2, 6, 2):
        ids = torch.randint(0, 9, (1, size))
        x = torch.randn(3, size, 4)
        assert_close(fast(ids, x), Rows()(ids, x))
    assert fast.stats().replays == 4


def test_what_is_returned_as_it_is_stays_that(events: Events):
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3), requires_grad=False)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = x + self.table.sum()
            return {"x": x, "table": self.table, "twice": (y, y), "rows": x.shape[0], "none": None}

    model = Same()
    fast = compiled(model, compile_sizes=[4])
    x = torch.randn(4, WIDTH)
    result = fast(x)
    assert fast.stats().replays == 1
    assert result["x"] is x
    assert result["table"] is model.table
    assert result["twice"][0] is result["twice"][1]
    assert (result["rows"], result["none"]) == (4, None)
    assert_close(result["twice"][0], x + model.table.sum())


# --- what is not recorded --------------------------------------------------------------


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[1:]


class AView(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y[1:]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (Counts, "updates in place"),
        (View, "returns a view"),
        (AView, "returns a view"),
    ],
)
def test_functions_that_do_more_than_return_are_served_unrecorded(
    events: Events, function: type[nn.Module], why: str
):
    fast, plain = compiled(function(), compile_sizes=[4]), function()
    for _ in range(3):
        x = torch.randn(4, WIDTH)
        assert_close(fast(x), plain(x))
    assert fast.stats().replays == 0
    (note,) = [note for note in fast.plan.notes if "not recorded" in note]
    assert why in note


def test_noise_is_not_recorded_as_if_it_were_a_result(events: Events):
    """On CPU each replay draws anew, so it differs from the call that it is compared with."""
    fast = compiled(lambda x: x + torch.rand_like(x), compile_sizes=[4])
    fast(torch.zeros(4, WIDTH))
    assert any("a replay computes something else" in note for note in fast.plan.notes)


def test_what_the_device_refuses_is_served_unrecorded_and_said(monkeypatch: pytest.MonkeyPatch):
    events = on_cpu(monkeypatch, refused={16})
    model = mlp()
    fast = compiled(model, cudagraph_capture_sizes=[2, 16])
    for size in (16, 2, 16):
        x = torch.randn(size, WIDTH)
        assert_close(fast(x), model(x))
    assert records(events) == [(2, 1)]
    assert fast.stats().replays == 1
    note = "size 16 is not recorded: operation not permitted when stream is capturing"
    assert note in fast.plan.notes


def test_a_size_that_is_not_faster_replayed_is_called_unless_it_was_named(
    monkeypatch: pytest.MonkeyPatch,
):
    on_cpu(monkeypatch, slow={4, 8})
    model = mlp()
    fast = compiled(model, compile_sizes=[2, 4], cudagraph_capture_sizes=[8])
    for size in (2, 4, 8):
        x = torch.randn(size, WIDTH)
        assert_close(fast(x), model(x))
    assert fast.stats().replays == 2  # of 2 and 8
    (note,) = [note for note in fast.plan.notes if "not recorded" in note]
    assert note == "size 4 is not recorded: a replay takes 3000000 us and a call 2000000"


# --- padding ---------------------------------------------------------------------------


def mean_of_rows(x: Tensor) -> Tensor:
    return x - x.mean(0)


def last_row(x: Tensor) -> Tensor:
    return (x * 2)[-1:].expand(x.shape[0], -1) + 0


def times_size(x: Tensor) -> Tensor:
    return x * x.shape[0]


def flat(x: Tensor) -> Tensor:
    return (x * 2).reshape(-1)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (mean_of_rows, "a row's result depends on other rows"),
        (last_row, "a row's result depends on other rows"),
        (times_size, "results depend on how many rows there are"),
        (flat, "a result is 128 long at size 16"),
    ],
)
def test_dependent_rows_are_not_padded(
    events: Events, function: Callable[[Tensor], Tensor], why: str
):
    fast = compiled(function, cudagraph_capture_sizes=[16], pad_to_captured=True)
    for size in (9, 16, 12):
        x = torch.randn(size, WIDTH)
        assert_close(fast(x), function(x))
    assert fast.stats().replays == 1
    (note,) = [note for note in fast.plan.notes if note.startswith("no size is padded to 16")]
    assert why in note


def test_sizes_of_another_graph_are_not_padded_to_it(events: Events):
    def branches(x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] < 12 else x - 1

    fast = compiled(branches, cudagraph_capture_sizes=[16], pad_to_captured=True)
    for size in (16, 9, 11, 12, 15):
        x = torch.randn(size, WIDTH)
        assert_close(fast(x), branches(x))
    assert fast.stats().replays == 3


# --- what does not go together ---------------------------------------------------------


def test_without_graphs_sizes_are_refused_by_name():
    fast = compiled(mlp(), cudagraph_capture_sizes=[4])
    with pytest.raises(UnsupportedOnDevice, match=r"cudagraph_capture_sizes=\(4,\) asks for"):
        fast(torch.randn(4, WIDTH))
    padded = compiled(mlp(), pad_to_captured=True)
    with pytest.raises(UnsupportedOnDevice, match="pad_to_captured=True asks for graphs"):
        padded(torch.randn(4, WIDTH))


def test_background_is_refused():
    with pytest.raises(InvalidField, match="cudagraph_capture_sizes cannot go with background"):
        Config(cudagraph_capture_sizes=[4], background=True)


def test_several_dimensions_are_refused(events: Events):
    fast = compiled(
        lambda x: x + 1,
        cudagraph_capture_sizes=[4],
        dynamic_dims={"x": {0: "batch", 1: "length"}},
    )
    with pytest.raises(InvalidDynamicDims, match="cudagraph_capture_sizes is for one dynamic"):
        fast(torch.randn(2, 2))


def test_threads_take_turns(events: Events):
    model = mlp()
    fast = compiled(model, compile_sizes=[4])
    fast(torch.randn(4, WIDTH))
    wrong: list[int] = []

    def calls(seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(4, WIDTH, generator=made)
            if not torch.allclose(fast(x), model(x), atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert fast.stats().replays == 151


def test_arguments_made_in_inference_mode(events: Events):
    model = mlp()
    fast = compiled(model, compile_sizes=[4])
    with torch.inference_mode():
        x = torch.randn(4, WIDTH)
        assert_close(fast(x), model(x))
    y = torch.randn(4, WIDTH)
    assert_close(fast(y), model(y))
    assert fast.stats().replays == 2
