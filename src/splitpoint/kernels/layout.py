"""What a packed weight looks like.

A packed weight is an ordinary contiguous tensor of the weight's dtype. The weight's rows (the
layer's columns) lie in blocks of `BLOCK`; within a block, k runs outside and columns inside, so
that one pass over memory feeds all columns of a block:

| dtype | shape | element [b, i, c, j] or [b, i, c] |
| --- | --- | --- |
| float32 | [blocks, k, 32] | weight[32 b + c, i] |
| bfloat16 | [blocks, ceil(k / 2), 32, 2] | weight[32 b + c, 2 i + j] |
| int8 | [blocks, 2 ceil(k / 2), 32] | weight[32 b + c, i] |

Zeros stand where the weight has no row or no k. With gate_up the weight's rows are as many
gates and then as many ups, and a block holds 16 gates and the 16 ups that they multiply:
c < 16 is row 16 b + c, and c >= 16 is row rows / 2 + 16 b + c - 16. Scales and biases are never
packed: they keep the order of the weight's rows.
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Columns of a block; the same for every instruction set."""

DTYPES = (torch.bfloat16, torch.float32, torch.int8)
"""Dtypes of weights that the kernels take."""


def packed_shape(rows: int, k: int, dtype: torch.dtype, gate_up: bool = False) -> tuple[int, ...]:
    """The shape of `pack_weight` of a [rows, k] weight.

    Raises:
        ValueError: for a dtype outside `DTYPES`, or an odd number of rows with gate_up.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a weight must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if gate_up and rows % 2:
        raise ValueError(f"gate_up needs an even number of weight rows, got {rows}")
    width, columns = (BLOCK // 2, rows // 2) if gate_up else (BLOCK, rows)
    blocks, pairs = -(-columns // width), -(-k // 2)
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
