"""The decoder layers that `bench.device` runs, of torch alone, and how calls are timed there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, without embedding, head, rotation and cache."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    layers: int


LLAMA_1B = Shape(2048, 32, 8, 8192, 16)
TINY = Shape(64, 4, 2, 128, 1)


class Block(nn.Module):
    """One layer; takes and returns [tokens, hidden]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.size = shape.hidden // shape.heads
        width = (shape.heads + 2 * shape.kv_heads) * self.size
        self.norm1, self.norm2 = (nn.RMSNorm(shape.hidden, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(shape.hidden, width, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        counts = self.heads, self.kv_heads, self.kv_heads
        parts = self.qkv(self.norm1(x)).split([n * self.size for n in counts], -1)
        q, k, v = (
            part.view(1, -1, n, self.size).transpose(1, 2)
            for part, n in zip(parts, counts, strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result


def llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """Layers with random weights, for inference."""
    torch.manual_seed(0)
    with device:
        layers = [Block(shape).to(dtype) for _ in range(shape.layers)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def median_ms(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, float]:
    """The median time of each of some calls, which take turns: between two events on the device,
    or of the clock where there are none."""
    for call in calls.values():
        for _ in range(3):
            call()
    synchronize(device)
    times: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                start, end = _event(), _event()
                start.record()
                call()
                end.record()
                times[name].append((start, end))
            else:
                before = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - before))
    synchronize(device)
    return {
        name: statistics.median(
            each if isinstance(each, float) else each[0].elapsed_time(each[1]) for each in found
        )
        for name, found in times.items()
    }
