"""What a packed weight looks like.

A packed weight is an ordinary contiguous tensor of the weight's dtype. The weight's rows (the
layer's columns) lie in blocks of `BLOCK`; within a block, k runs outside and columns inside, so
that one pass over memory feeds all columns of a block:

| dtype | shape | element [b, i, c, j] or [b, i, c] |
| --- | --- | --- |
| float32 | [blocks, k, 32] | weight[32 b + c, i] |
| bfloat16 | [blocks, ceil(k / 2), 32, 2] | weight[32 b + c, 2 i + j] |
| int8 | [blocks, 2 ceil(k / 2), 32] | weight[32 b + c, i] |

| int8, x rounded to int8 too | [blocks, ceil(k / 4), 32, 4] | weight[32 b + c, 4 i + j] |

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


MOST_INT8_DEPTH = (2**31 - 1) // (128 * 127)
"""The largest k of `quads`: int32 holds the sum of so many products."""


def quads_shape(rows: int, k: int) -> tuple[int, ...]:
    """The shape of `quads` of a [rows, k] weight."""
    return (-(-rows // BLOCK), -(-k // 4), BLOCK, 4)


def quads(weight: torch.Tensor) -> torch.Tensor:
    """An int8 [rows, k] weight in groups of four k's, which `linear_packed` multiplies by an x that
    it rounds to int8, each row with a scale of its own (`reference.quantised_rows`)."""
    rows, k = weight.shape
    blocks, groups, *_ = shape = quads_shape(rows, k)
    full = weight.new_zeros(blocks * BLOCK, groups * 4)
    full[:rows, :k] = weight
    return full.view(blocks, BLOCK, groups, 4).transpose(1, 2).contiguous().view(shape)


def quads_of_packed(packed: torch.Tensor) -> torch.Tensor:
    """`quads` of the weight that `pack_weight` made an int8 [blocks, k, 32] of."""
    blocks, k, _ = packed.shape
    groups = -(-k // 4)
    full = packed.new_zeros(blocks, groups * 4, BLOCK)
    full[:, :k] = packed
    return full.view(blocks, groups, 4, BLOCK).transpose(2, 3).contiguous()


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
