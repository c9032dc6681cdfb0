"""The operators without data: the shapes that tracing and compiling see."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import packed_shape


def register_fakes() -> None:
    """Give the loaded operators their fake implementations. Call once."""
    torch.library.register_fake("splitpoint::pack_weight", _pack_weight)
    torch.library.register_fake("splitpoint::linear_packed", _linear_packed)
    torch.library.register_fake("splitpoint::linear_gemv", _linear_gemv)


def _pack_weight(weight: Tensor, gate_up: bool = False) -> Tensor:
    rows, k = weight.shape
    return weight.new_empty(packed_shape(rows, k, weight.dtype, gate_up))


def _linear_packed(
    x: Tensor,
    weight: Tensor,
    n: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    return x.new_empty((x.shape[0], n))


def _linear_gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    rows = weight.shape[0]
    return x.new_empty((x.shape[0], rows // 2 if activation == "silu_mul" else rows))
