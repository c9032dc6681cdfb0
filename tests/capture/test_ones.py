"""What has another shape at a length of 1 has a graph of its own there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from splitpoint import Config, compile


def view_of_the_argument(x: Tensor) -> Tensor:
    return x.squeeze()


def of_a_value(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1).squeeze()


def of_a_dimension(x: Tensor) -> Tensor:
    return (x * 2).squeeze(0).sum(0)


def by_function(x: Tensor) -> Tensor:
    return torch.squeeze(x * 2, 0) + 1


def in_place(x: Tensor) -> Tensor:
    return (x * 2).squeeze_(0)


def inside_of_an_operator(x: Tensor) -> Tensor:
    return torch.atleast_2d((x * 2).squeeze()).sum(0)


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(
    "function",
    [
        view_of_the_argument,
        of_a_value,
        of_a_dimension,
        by_function,
        in_place,
        inside_of_an_operator,
    ],
)
def test_one_dimension(function: Callable[[Tensor], Tensor], backend: str, first: int) -> None:
    config = Config(max_size=9, split_points=[4], backend=backend, cache_dir="")
    compiled = compile(function, config, dynamic_dims={"x": 0})
    for size in (first, 1, 2, 5):
        x = torch.randn(size, 3)
        torch.testing.assert_close(compiled(x.clone()), function(x.clone()))


def test_several_dimensions() -> None:
    def function(x: Tensor) -> Tensor:
        return (x + 1).squeeze()

    config = Config(max_size=36, backend="eager", cache_dir="")
    dims = {"x": {0: "batch", 1: "length"}}
    compiled = compile(function, config, dynamic_dims=dims)
    for batch, length in ((3, 4), (1, 4), (3, 1), (1, 1), (2, 9), (4, 1)):
        x = torch.randn(batch, length, 2)
        torch.testing.assert_close(compiled(x), function(x))


def test_the_plan_names_the_line() -> None:
    compiled = compile(of_a_value, Config(max_size=9, backend="eager", cache_dir=""))
    compiled(torch.randn(3, 3))
    (alone, rest) = compiled.plan.entries
    assert (str(alone.range), str(rest.range)) == ("[1,1]", "[2,9]")
    assert "size != 1 (squeeze has another shape then, at " in rest.note
    assert "test_ones.py" in rest.note
    assert "\n" not in rest.note


def test_a_dimension_that_is_static_asks_nothing() -> None:
    compiled = compile(lambda x: (x * 2).squeeze(1), Config(max_size=9, cache_dir=""))
    for size in (3, 1):
        assert compiled(torch.randn(size, 1, 2)).shape == (size, 2)
    assert len(compiled.plan.entries) == 1
