"""What a packed weight looks like.

A packed weight is an ordinary contiguous tensor of the weight's dtype. The weight's rows (the
layer's columns) lie in blocks of `BLOCK`; within a block, k runs outside and columns inside, so
that one pass over memory feeds all columns of a block:

| dtype | shape | element [b, i, c, j] or [b, i, c] |
| --- | --- | --- |
| float32 | [blocks, k, 32] | weight[32 b + c, i] |
| bfloat16 | [blocks, ceil(k / 2), 32, 2] | weight[32 b + c, 2 i + j] |
| int8 | [blocks, 2 ceil(k / 2), 32] | weight[32 b + c, i] |

Zeros stand where the weight has no row or no k. Scales and biases are never packed: they keep the
order of the weight's rows.
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Columns of a block; the same for every instruction set."""

DTYPES = (torch.bfloat16, torch.float32, torch.int8)
"""Dtypes of weights that the kernels take."""


def packed_shape(rows: int, k: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of `pack_weight` of a [rows, k] weight.

    Raises:
        ValueError: for a dtype outside `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a weight must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    blocks, pairs = -(-rows // BLOCK), -(-k // 2)
    if dtype == torch.bfloat16:
        return (blocks, pairs, BLOCK, 2)
    return (blocks, 2 * pairs if dtype == torch.int8 else k, BLOCK)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a [rows, k] weight to int8 with one float32 scale a row, symmetric around zero.

    Returns (values, scale) with values * scale[:, None] within scale / 2 of the weight; a row
    of zeros gets scale 1.
    """
    rows = weight.float()
    largest = rows.abs().amax(dim=1) if weight.shape[1] else rows.new_zeros(weight.shape[0])
    scale = torch.where(largest > 0, largest / 127, 1.0)
    values = (rows / scale[:, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), scale
