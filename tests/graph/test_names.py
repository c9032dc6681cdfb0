"""Methods of tensors that a graph is split at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from splitpoint import Config, compile

METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "aten::view": lambda x: (x * 2).view(-1) + 1,
    "aten::view.dtype": lambda x: (x * 2).view(torch.int32) + 1,
    "aten::reshape": lambda x: (x * 2).reshape(x.shape[0], 2, 2) + 1,
    "aten::permute": lambda x: (x * 2).permute(1, 0) + 1,
    "aten::expand": lambda x: (x * 2)[None].expand(3, -1, -1) + 1,
    "aten::repeat": lambda x: (x * 2).repeat(2, 1) + 1,
    "aten::flip": lambda x: (x * 2).flip(1) + 1,
    "aten::tile": lambda x: (x * 2).tile(1, 2) + 1,
    "aten::new_zeros": lambda x: (x * 2).new_zeros(x.shape[0], 2) + 1,
    "aten::transpose": lambda x: (x * 2).transpose(0, 1) + 1,
}


@pytest.mark.parametrize("runner", ["native", "python"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_called_with_what_the_model_gave_it(name: str, runner: str) -> None:
    function, operator = METHODS[name], name.removesuffix(".dtype")
    config = Config(
        max_size=9, backend="eager", splitting_ops=[operator], runner=runner, cache_dir=""
    )
    compiled = compile(function, config, dynamic_dims={"x": 0})
    for size in (3, 5, 1):
        x = torch.randn(size, 4)
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("give", [lambda x: (x.shape[0], 4), lambda x: [-1]])
def test_a_list_of_numbers_stays_one(give: Callable[[Tensor], object]) -> None:
    def function(x: Tensor) -> Tensor:
        return (x * 2).view(give(x)) + 1

    config = Config(max_size=9, backend="eager", splitting_ops=["aten::view"], cache_dir="")
    compiled = compile(function, config, dynamic_dims={"x": 0})
    for size in (3, 5):
        x = torch.randn(size, 4)
        assert torch.equal(compiled(x), function(x))
