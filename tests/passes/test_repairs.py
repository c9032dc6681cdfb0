"""What Inductor compiles wrongly is compiled right here."""

from collections.abc import Callable

import pytest
import torch

import splitpoint
from splitpoint import Config

UPDATES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "index_put_": lambda v, at: v.index_put_((at,), torch.ones_like(v[at])),
    "accumulated": lambda v, at: v.index_put_((at,), torch.ones_like(v[at]), accumulate=True),
    "index_copy_": lambda v, at: v.index_copy_(0, at[:1], torch.ones_like(v[:1])),
    "index_add_": lambda v, at: v.index_add_(0, at, torch.ones_like(v[at])),
    "index_fill_": lambda v, at: v.index_fill_(0, at, 1),
    "put_": lambda v, at: v.put_(at, torch.ones_like(v[at])),
    "scatter_": lambda v, at: v.scatter_(0, at, torch.ones_like(v[at])),
    "a diagonal": lambda v, at: v.view(2, 2).diagonal().fill_(3),
}


class Model(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("held", torch.arange(4) + 2.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view = self.held.view(torch.int32)
        first = view[:2]
        UPDATES[self.name](view, (first * 0).long())
        return first + 1, x + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATES)
def test_updates_of_views_with_another_dtype(name: str) -> None:
    eager, ours = Model(name), Model(name)
    compiled = splitpoint.compile(ours, Config(max_size=8, cache_dir=""))
    for size in (3, 1, 8):
        x = torch.randn(size, 4)
        wanted, found = eager(x), compiled(x)
        assert torch.equal(eager.held.view(torch.int32), ours.held.view(torch.int32))
        assert all(map(torch.equal, wanted, found))
