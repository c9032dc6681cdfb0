"""The kernels' operators in plain torch and float64: what the C++ must agree with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BLOCK, packed_shape

ACTIVATIONS = ("none", "silu_mul", "gelu", "gelu_tanh")
"""What may follow the product; "silu_mul" is silu of the first half of the columns times the
second half, "gelu" the exact one by erf."""


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation((x @ weight^T) * scale + bias) + residual, in float64.

    x is [tokens, k], weight the unpacked [rows, k], scale and bias [rows]; the result and the
    residual are [tokens, rows], or [tokens, rows / 2] with "silu_mul".

    Raises:
        ValueError: for an activation outside `ACTIVATIONS`.
    """
    y = x.double() @ weight.double().t()
    if scale is not None:
        y = y * scale.double()
    if bias is not None:
        y = y + bias.double()
    if activation == "silu_mul":
        gate, up = y.chunk(2, dim=1)
        y = F.silu(gate) * up
    elif activation in ("gelu", "gelu_tanh"):
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation != "none":
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    return y if residual is None else y + residual.double()


def pack_weight(weight: Tensor, gate_up: bool = False) -> Tensor:
    """The packed layout (see `layout`) of a [rows, k] weight, by indexing."""
    rows, k = weight.shape
    shape = packed_shape(rows, k, weight.dtype, gate_up)
    padded_k = shape[1] * (2 if weight.dtype == torch.bfloat16 else 1)
    if gate_up:
        half, width = rows // 2, BLOCK // 2
        parts = [
            _padded(part, shape[0] * width, padded_k) for part in (weight[:half], weight[half:])
        ]
        blocks = [part.view(shape[0], width, padded_k) for part in parts]
        by_block = torch.cat(blocks, dim=1)
    else:
        by_block = _padded(weight, shape[0] * BLOCK, padded_k).view(shape[0], BLOCK, padded_k)
    if weight.dtype == torch.bfloat16:
        return by_block.view(shape[0], BLOCK, shape[1], 2).transpose(1, 2).contiguous()
    return by_block.transpose(1, 2).contiguous()


def _padded(part: Tensor, rows: int, k: int) -> Tensor:
    full = part.new_zeros(rows, k)
    full[: part.shape[0], : part.shape[1]] = part
    return full
