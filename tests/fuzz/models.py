"""A module with buffers of all kinds, for tests that write its forward themselves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

FORWARD = Callable[[Any, torch.Tensor, torch.Tensor], Any]
"""Takes the module and two tensors `[size, 4]`."""

SIZES = (5, 1, 2, 8, 9, 64)
MODES = ("no_grad", "inference_mode", "enable_grad", "inference_arguments")

LAYOUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "plain": lambda n: quarters(n, 4),
    "turned": lambda n: quarters(4, n).T,
    "columns": lambda n: quarters(n, 8)[:, ::2],
    "shifted": lambda n: quarters(n + 3, 4)[3:],
    "expanded": lambda n: quarters(1, 4).expand(n, 4),
}


def quarters(*shape: int) -> torch.Tensor:
    """Numbers that sums and products of a few are exact of."""
    return torch.randint(-8, 9, shape) / 4


def with_buffers(forward: FORWARD, layout: str = "plain", **config: Any) -> dict[str, Any]:
    """A program, as `compare.check` takes one, whose module has this forward."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(quarters(4, 4), requires_grad=False)
            self.register_buffer("cache", quarters(80, 4))
            self.register_buffer("part", self.cache[4:70])
            self.register_buffer("count", torch.tensor(2))
            self.register_buffer("kv", quarters(2, 80, 4))
            self.plain = quarters(4)
            self.config = CONFIG

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return forward(self, x, y)

    def arguments(n: int) -> list[torch.Tensor]:
        torch.manual_seed(n)
        return [LAYOUTS[layout](n), quarters(n, 4)]

    return {
        "Model": Model,
        "arguments": arguments,
        "CONFIG": {"max_size": 64, "split_points": [8], "backend": "eager"} | config,
        "DIMS": {"x": 0, "y": 0},
        "MAX_DIMS": {},
        "CALLS": [((size,), mode) for mode in MODES for size in SIZES],
    }


CONFIG = SimpleNamespace(name="an object that lives longer than a call")
