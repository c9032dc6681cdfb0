"""Models that no one graph can hold: cut where they must be, or refused by the line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import splitpoint
from splitpoint import Config, Range, errors

CONFIG = Config(max_size=32, split_points=[8], cache_dir="", backend="eager")
SIZES = (3, 1, 8, 9, 32, 5)


def branches_on_data(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    if y.sum().item() > 0:
        return y + 1
    return y - 1


def branches_on_a_tensor(x: torch.Tensor) -> torch.Tensor:
    return x.exp() if x.sum() > 0 else x.cos()


def prints(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    print("a line")
    return y * 2


def keeps_some(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0].exp().sum() + x.mean()


def reads_numbers(x: torch.Tensor) -> list[float]:
    return (x + 1).sum(1).tolist()


def maps_items(x: torch.Tensor) -> list[Any]:
    return list(map(lambda value: value.item(), x[0]))  # noqa: C417


def opens_a_file(x: torch.Tensor) -> torch.Tensor:
    with open("/dev/null") as file:
        file.read()
    return x + 1


def calls_what_is_not_compiled(x: torch.Tensor) -> torch.Tensor:
    return torch.compiler.disable(torch.sin)(x * 2) + 1


BREAKS = (
    branches_on_data,
    branches_on_a_tensor,
    prints,
    keeps_some,
    reads_numbers,
    maps_items,
    opens_a_file,
    calls_what_is_not_compiled,
)


@pytest.mark.parametrize("function", BREAKS)
def test_what_no_graph_can_hold_is_right(
    function: Callable[[torch.Tensor], Any], caplog: pytest.LogCaptureFixture
) -> None:
    compiled = splitpoint.compile(function, CONFIG)
    for size in (*SIZES, *SIZES):
        x = torch.rand(size, 4)
        assert_close(compiled(x), function(x))
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len([each for each in warnings if each.name == "splitpoint"]) == 1
    notes = "\n".join(compiled.plan.notes)
    assert "test_parts.py:" in notes
    assert "between the graphs a call spends" in notes


@pytest.mark.parametrize("function", BREAKS)
def test_or_it_is_refused_in_three_lines(function: Callable[[torch.Tensor], Any]) -> None:
    config = Config(max_size=32, cache_dir="", backend="eager", on_break="error")
    with pytest.raises(errors.CaptureError) as caught:
        splitpoint.compile(function, config)(torch.randn(3, 4))
    assert isinstance(caught.value, (errors.GraphBreak, errors.UnsupportedGraph))
    assert len(str(caught.value).splitlines()) <= 3
    if isinstance(caught.value, errors.GraphBreak):
        assert "test_parts.py:" in str(caught.value)
        assert "on_break='split'" in str(caught.value)
        assert len(caught.value.details) > len(str(caught.value).splitlines()[0]) // 2


def test_each_part_has_its_ranges() -> None:
    config = Config(max_size=32, split_points=[8], cache_dir="")
    compiled = splitpoint.compile(branches_on_data, config)
    for size in (3, 8, 9, 32):
        x = torch.rand(size, 4)
        assert_close(compiled(x), branches_on_data(x))
    stats = compiled.stats()
    assert stats.captures <= 3  # torch takes a number as a constant the first time
    assert stats.dispatches == {Range(1, 8): 4, Range(9, 32): 4}
    assert stats.compilations == 2 * stats.captures
    compiled.reset()
    assert compiled.stats().captures == 0


def test_sizes_out_of_the_plan_are_refused_or_run_by_the_model() -> None:
    compiled = splitpoint.compile(branches_on_data, CONFIG)
    compiled(torch.rand(3, 4))
    with pytest.raises(errors.SizeOutOfPlan, match=r"size 33"):
        compiled(torch.rand(33, 4))
    config = Config(max_size=32, cache_dir="", backend="eager", on_out_of_plan="eager")
    compiled = splitpoint.compile(branches_on_data, config)
    for size in (3, 33):
        x = torch.rand(size, 4)
        assert_close(compiled(x), branches_on_data(x))
    assert compiled.stats().eager_calls == 1


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(self.lstm(x * 2)[0].relu())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return x * self.calls


def test_recurrent_layers() -> None:
    model = Recurrent().eval().requires_grad_(False)
    compiled = splitpoint.compile(model, CONFIG)
    for size in SIZES:
        x = torch.randn(size, 3, 4)
        assert_close(compiled(x), model(x))


def test_changes_of_the_model_happen_at_each_call() -> None:
    model = Counting().eval()
    compiled = splitpoint.compile(model, CONFIG)
    for call in range(1, 6):
        assert_close(compiled(torch.ones(3, 4)), torch.full((3, 4), float(call)))
    assert model.calls == 5


def test_a_kind_of_arguments_that_breaks_leaves_the_others_as_they_are() -> None:
    def function(x: torch.Tensor, careful: bool = False) -> torch.Tensor:
        if careful and x.isnan().any():
            return torch.zeros_like(x)
        return x + 1

    compiled = splitpoint.compile(function, CONFIG)
    for size in SIZES:
        x = torch.randn(size, 4)
        assert_close(compiled(x), x + 1)
        assert_close(compiled(x, careful=True), x + 1)
        assert_close(compiled(x * torch.nan, careful=True), torch.zeros(size, 4))
    assert compiled.stats().dispatches[Range(9, 32)] >= 4


def test_what_the_model_raises_itself_is_no_break() -> None:
    def raises(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 2:
            raise ValueError("too many")
        return x

    with pytest.raises(errors.CaptureError) as caught:
        splitpoint.compile(raises, CONFIG)(torch.randn(3, 4))
    assert not isinstance(caught.value, errors.GraphBreak)


@pytest.mark.parametrize("name", ["background", "free_original_weights", "mmap_packed_weights"])
def test_what_needs_one_graph_is_refused_by_name(name: str, tmp_path: Path) -> None:
    asked = {name: True, "cache_dir": str(tmp_path / "kept")}
    compiled = splitpoint.compile(branches_on_data, Config(max_size=32, **asked))
    with pytest.raises(errors.GraphBreak, match=name):
        compiled(torch.randn(3, 4))


def test_what_torch_fails_at_by_itself_has_a_name() -> None:
    @torch.library.custom_op("splitpoint_test::without_shape", mutates_args=())
    def without_shape(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @without_shape.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("its shape is not told")

    def forward(x: torch.Tensor) -> torch.Tensor:
        print("a line")
        return without_shape(x)

    with pytest.raises(errors.CutFailed, match="on_break='split'") as caught:
        splitpoint.compile(forward, CONFIG)(torch.randn(3, 4))
    assert len(str(caught.value).splitlines()) <= 3
    assert "its shape is not told" in (caught.value.details or "")
