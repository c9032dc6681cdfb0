"""Choices that lead by little are timed again in compiled code, and the slower goes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import splitpoint
from splitpoint import Config, Plan, kernels
from splitpoint.passes.linear_sites import LinearShape
from splitpoint.runtime.second_measure import can_be_called, is_behind
from splitpoint.tuning.linear import LinearTuner

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = kernels.use_instruction_set()
    yield
    kernels.use_instruction_set(before)


@pytest.fixture
def leads_by_little(monkeypatch: Patch) -> None:
    """As if the packed kernel had been measured to be a little faster by itself."""

    def seconds(
        self: LinearTuner,
        shape: LinearShape,
        rows: int,
        names: list[str],
        own: Sequence[Sequence[Tensor]] = (),
    ) -> dict[str, float]:
        given = {"packed": 1.0, "inductor": 1.025}
        known = {name: given.get(name, 9.0) for name in names}
        self._seconds[shape.of_any_rows, rows] = known
        return known

    monkeypatch.setattr(LinearTuner, "seconds", seconds)


class Model(torch.nn.Module):
    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(k, n), torch.nn.Linear(n, k)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) + x


def chosen(plan: Plan) -> set[str]:
    return {name for entry in plan.entries for name in entry.linear.values()}


def notes(plan: Plan) -> str:
    return " ".join(entry.note for entry in plan.entries)


@pytest.mark.slow
def test_what_is_slower_in_compiled_code_goes(leads_by_little: None, tmp_path: Path) -> None:
    """A kernel without vector instructions is no match for a library's at 256 rows."""
    kernels.use_instruction_set("portable")
    model = Model(256, 384)
    config = Config(max_size=256, split_points=[128], cache_dir=str(tmp_path))
    compiled = splitpoint.compile(model, config)
    x = torch.randn(200, 256)
    assert_close(compiled(x), model(x))
    entry = compiled.plan.entries[-1]
    assert not entry.linear
    assert "Inductor's own layers are faster in compiled code: " in entry.note
    assert compiled.stats().compilations == 2  # those that were tried are not counted

    again = splitpoint.compile(model, config)
    assert_close(again(x), model(x))
    assert again.stats().compilations == 0
    assert again.plan == compiled.plan


@pytest.mark.slow
def test_what_is_faster_stays(leads_by_little: None) -> None:
    """A row over weights in memory, in bfloat16: reading them packed is faster than what torch
    has for it on any processor."""
    model = Model(2048, 2048).bfloat16()
    compiled = splitpoint.compile(model, Config(max_size=1, cache_dir=""))
    compiled(torch.randn(1, 2048).bfloat16())
    assert chosen(compiled.plan) == {"packed"}
    assert not notes(compiled.plan)


@pytest.mark.parametrize(
    "asked",
    [
        {"linear": {"1-256": "packed"}},
        {"linear_budget_s": 0.0},
        {"free_original_weights": True},
        {"weights": "int8"},
    ],
)
def test_what_was_asked_for_is_not_measured_again(
    leads_by_little: None, asked: dict[str, object]
) -> None:
    kernels.use_instruction_set("portable")
    compiled = splitpoint.compile(Model(256, 384), Config(max_size=256, cache_dir="", **asked))
    compiled(torch.randn(200, 256))
    assert chosen(compiled.plan)
    assert not notes(compiled.plan)


def updates(self: Model, x: Tensor) -> Tensor:
    self.up.bias.add_(1)
    return self.up(x)


@pytest.mark.parametrize(
    ("forward", "wanted"),
    [(Model.forward, True), (updates, False)],
)
def test_which_pieces_may_be_called_with_anything(
    forward: Callable[[Model, Tensor], Tensor], wanted: bool
) -> None:
    model = type("Other", (Model,), {"forward": forward})(8, 8)
    compiled = splitpoint.compile(model, Config(max_size=4, backend="eager", cache_dir=""))
    compiled(torch.randn(2, 8))
    assert compiled._program is not None
    (lane,) = compiled._program.lanes
    assert lane is not None
    assert [can_be_called(lane, each) for each in lane.graph.split.pieces.values()] == [wanted]


def test_a_piece_that_is_given_integers_is_not_called() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 8))
    compiled = splitpoint.compile(
        model.requires_grad_(False), Config(max_size=4, backend="eager", cache_dir="")
    )
    compiled(torch.tensor([1, 4]))
    assert compiled._program is not None
    (lane,) = compiled._program.lanes
    assert lane is not None
    assert [can_be_called(lane, each) for each in lane.graph.split.pieces.values()] == [False]


def test_what_is_behind() -> None:
    assert not is_behind([])
    assert not is_behind([1.0, 1.01, 1.02])
    assert not is_behind([0.8, 1.1])
    assert is_behind([1.0, 1.1, 1.2])
