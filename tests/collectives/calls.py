"""Calls that ranks make in tests of what goes wrong; each returns how it ended and when."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from splitpoint.torch_internals.distributed import group_name


@dataclass(frozen=True)
class Ended:
    error: str
    """The class and message of what was raised; "" when nothing was."""
    seconds: float


def fused(rows: int = 4, hidden: int = 64, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    settings: dict[str, Any] = {"eps": 1e-6} | more
    given = {
        "residual": settings.pop("residual", None),
        "weight": settings.pop("weight", torch.ones(hidden)),
        "quant_scale": settings.pop("quant_scale", None),
    }
    x = torch.ones(rows, hidden, dtype=dtype)
    name = group_name(dist.group.WORLD)
    return torch.ops.splitpoint.allreduce_rmsnorm(x, *given.values(), group=name, **settings)


def reduced(count: int = 64, **more: Any) -> Any:
    name = group_name(dist.group.WORLD)
    return torch.ops.splitpoint.all_reduce(torch.ones(count), group=name, **more)


def scattered(rows: int) -> Any:
    name = group_name(dist.group.WORLD)
    return torch.ops.splitpoint.reduce_scatter(torch.ones(rows, 3), group=name)


def gathered(rows: int) -> Any:
    name = group_name(dist.group.WORLD)
    return torch.ops.splitpoint.all_gather(torch.ones(rows, 3), group=name)


FUNCTIONS = {"fused": fused, "reduced": reduced, "scattered": scattered, "gathered": gathered}

Step = tuple[str, dict[str, Any]]


def make(by_rank: list[list[Step]]) -> Ended:
    """Each rank makes its own calls, one after the other, until one fails."""
    start = time.monotonic()
    try:
        for name, settings in by_rank[dist.get_rank()]:
            FUNCTIONS[name](**settings)
    except (RuntimeError, ValueError, TypeError) as error:
        return Ended(f"{type(error).__name__}: {error}", time.monotonic() - start)
    return Ended("", time.monotonic() - start)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
