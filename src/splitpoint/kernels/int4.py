"""4-bit weights in groups: how they are quantised, and what a packed one looks like.

A packed 4-bit weight of [n, k] is a contiguous uint8 tensor [ceil(n / 32), k / group, bytes] that
holds its scales too. For each block of 32 columns (rows of the weight) and group of k's lie

| bytes | what |
| --- | --- |
| 64 | 32 scales, bfloat16 |
| 32 | 32 zero points, int8 from -8 to 7, in weights that have them |
| 16 * group | for each 8 k's 32 words of 32 bits, one a column |

A word holds eight values in two's complement, -8 to 7, k's in the order 0, 2, 4, 6, 1, 3, 5, 7 from
its lowest bits on. A weight is (value - zero point) * scale. Zeros stand where there is no row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BLOCK

GROUPS = (32, 64, 128)
"""k's that may share a scale."""

PREFERRED_GROUPS = (64, 32)
"""Groups that a weight is given when it is quantised, the first that divides its k."""

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight k's the bits of a word hold, from the lowest four on."""


def int4_shape(rows: int, k: int, group: int, zero_points: bool = False) -> tuple[int, int, int]:
    """The shape of a packed 4-bit weight of [rows, k].

    Raises:
        ValueError: for a group outside `GROUPS`, or a k that is no multiple of it.
    """
    if group not in GROUPS or k % group or not k:
        raise ValueError(
            f"a 4-bit weight has groups of {', '.join(map(str, GROUPS))} that divide its k, got "
            f"groups of {group} and k = {k}"
        )
    head = BLOCK * (3 if zero_points else 2)
    return (-(-rows // BLOCK), k // group, head + BLOCK * group // 2)


def int4_group(k: int) -> int | None:
    """The group that a weight of k columns is quantised in; None where none divides it."""
    return next((group for group in PREFERRED_GROUPS if k and k % group == 0), None)


def quantize_int4(
    weight: Tensor, group: int, zero_points: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a [rows, k] weight to 4 bits: (values int8 [rows, k] from -8 to 7, scales bfloat16
    [rows, k / group], zero points int8 [rows, k / group] or None).

    Symmetric, the scale has the sign that gives the largest magnitude of a group the value -8, as
    there is no 8. With zero points, a group's range, widened to hold 0, is cut into 15 steps.

    Raises:
        ValueError: as `int4_shape`.
    """
    rows, k = weight.shape
    int4_shape(rows, k, group, zero_points)
    groups = weight.float().reshape(rows, k // group, group)
    if zero_points:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = _usable((high - low) / 15)
        zeros = (-8 - low / scales.float()).round_().clamp_(-8, 7)
        values = (groups / scales.float()[:, :, None]).round_() + zeros[:, :, None]
        values = values.clamp_(-8, 7)
        return values.to(torch.int8).view(rows, k), scales, zeros.to(torch.int8)
    at = groups.abs().argmax(2, keepdim=True)
    scales = _usable(groups.gather(2, at)[:, :, 0] / -8)
    values = (groups / scales.float()[:, :, None]).round_().clamp_(-8, 7)
    return values.to(torch.int8).view(rows, k), scales, None


def _usable(scales: Tensor) -> Tensor:
    """Scales as bfloat16, 1 for a group of zeros."""
    rounded = scales.to(torch.bfloat16)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def dequantize_int4(values: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """The float32 [rows, k] weight that values and scales stand for; it is exact."""
    rows, k = values.shape
    groups = values.view(rows, scales.shape[1], k // scales.shape[1]).float()
    if zero_points is not None:
        groups = groups - zero_points.float()[:, :, None]
    return (groups * scales.float()[:, :, None]).reshape(rows, k)


def pack_int4(values: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """The packed weight, uint8 [blocks, groups, bytes], of what `quantize_int4` returns."""
    rows, k = values.shape
    group = k // scales.shape[1]
    blocks, count, size = int4_shape(rows, k, group, zero_points is not None)
    packed = torch.zeros(blocks, count, size, dtype=torch.uint8)

    def columns(each: Tensor) -> Tensor:
        """[blocks, groups, 32] of [rows, groups]."""
        whole = each.new_zeros(blocks * BLOCK, *each.shape[1:])
        whole[:rows] = each
        return _whole(whole.view(blocks, BLOCK, count).transpose(1, 2))

    head = 2 * BLOCK
    packed[:, :, :head] = columns(scales.to(torch.bfloat16)).view(torch.uint8)
    if zero_points is not None:
        packed[:, :, head : head + BLOCK] = columns(zero_points).view(torch.uint8)
        head += BLOCK
    nibbles = values.new_zeros(blocks * BLOCK, k)
    nibbles[:rows] = values
    nibbles &= 15
    # [blocks, 32, groups, words, bytes, 2]: the two values of a byte last, the lower one first.
    eights = nibbles.view(blocks, BLOCK, count, group // 8, 8)[..., list(_ORDER)]
    pairs = eights.view(torch.uint8).view(blocks, BLOCK, count, group // 8, 4, 2)
    words = pairs[..., 0] | pairs[..., 1] << 4
    packed[:, :, head:] = words.permute(0, 2, 3, 1, 4).reshape(blocks, count, size - head)
    return packed


def _whole(tensor: Tensor) -> Tensor:
    """A contiguous copy, also in its strides where it is empty."""
    return tensor.clone(memory_format=torch.contiguous_format)


def unpack_int4(packed: Tensor, rows: int, k: int) -> Tensor:
    """The float32 [rows, k] weight that a packed one stands for, by indexing."""
    blocks, count, size = packed.shape
    group = k // count
    zeros = size == int4_shape(rows, k, group, True)[2]
    head = 2 * BLOCK

    def columns(each: Tensor) -> Tensor:
        """[rows, groups] of [blocks, groups, 32]."""
        return each.transpose(1, 2).reshape(blocks * BLOCK, count)[:rows]

    scales = columns(_whole(packed[:, :, :head]).view(torch.bfloat16))
    zero_points = None
    if zeros:
        zero_points = columns(_whole(packed[:, :, head : head + BLOCK]).view(torch.int8))
        head += BLOCK
    words = packed[:, :, head:].reshape(blocks, count, group // 8, BLOCK, 4)
    nibbles = torch.stack([words & 15, words >> 4], -1)
    nibbles = nibbles.reshape(blocks, count, group // 8, BLOCK, 8)
    order = torch.tensor(_ORDER).argsort()
    values = nibbles[..., order].permute(0, 3, 1, 2, 4).reshape(blocks * BLOCK, k)[:rows]
    values = torch.where(values > 7, values.to(torch.int8) - 16, values.to(torch.int8))
    return dequantize_int4(values, scales, zero_points)
