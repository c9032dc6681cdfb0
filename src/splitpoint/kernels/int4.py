"""4-bit weights in groups: how they are quantised, and what a packed one looks like.

A packed 4-bit weight of [n, k] is a contiguous uint8 tensor [ceil(n / 32), k / group, bytes] that
holds its scales too. For each block of 32 columns (rows of the weight) and group of k's lie

| bytes | what |
| --- | --- |
| 64 or 128 | 32 scales, bfloat16 or float32 |
| 32 | 32 zero points, int8 from -8 to 7, in weights that have them |
| 16 * group | for each 8 k's 32 words of 32 bits, one a column |

A word holds eight values in two's complement, -8 to 7, k's in the order 0, 2, 4, 6, 1, 3, 5, 7 from
its lowest bits on. A weight is (value - zero point) * scale. Zeros stand where there is no row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import BLOCK

GROUPS = (32, 64, 128)
"""k's that may share a scale."""

PREFERRED_GROUPS = (64, 32)
"""Groups that a weight is given when it is quantised, the first that divides its k."""

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight k's the bits of a word hold, from the lowest four on."""


@dataclass(frozen=True)
class Int4Format:
    """What the groups of a packed 4-bit weight hold."""

    group: int
    """k's that share a scale."""
    zero_points: bool = False
    wide_scales: bool = False
    """Whether scales are float32, which holds those of float16 exactly, and not bfloat16."""

    @property
    def scale_bytes(self) -> int:
        """Bytes of a group's scales in a block."""
        return BLOCK * (4 if self.wide_scales else 2)

    @property
    def head_bytes(self) -> int:
        """Bytes of a group in a block that come before its values."""
        return self.scale_bytes + (BLOCK if self.zero_points else 0)

    @property
    def bytes(self) -> int:
        """Bytes of a group in a block."""
        return self.head_bytes + BLOCK * self.group // 2

    def shape(self, rows: int, k: int) -> tuple[int, int, int]:
        """The shape of a packed weight of [rows, k].

        Raises:
            ValueError: for a group outside `GROUPS`, or a k that is no multiple of it.
        """
        if self.group not in GROUPS or k % self.group or not k:
            raise ValueError(
                f"a 4-bit weight has groups of {', '.join(map(str, GROUPS))} that divide its k, "
                f"got groups of {self.group} and k = {k}"
            )
        return (-(-rows // BLOCK), k // self.group, self.bytes)

    def __str__(self) -> str:
        zeros = "_zeros" if self.zero_points else ""
        return f"int4_{self.group}{zeros}{'_wide' if self.wide_scales else ''}"


INT4_FORMATS = tuple(
    itertools.starmap(Int4Format, itertools.product(GROUPS, (False, True), (False, True)))
)
"""All that the kernels take. Their groups differ in bytes: a packed weight needs no label."""


def int4_format(shape: Sequence[int]) -> Int4Format | None:
    """The format of a packed weight of a shape; None where it is none."""
    if len(shape) != 3:
        return None
    return next((each for each in INT4_FORMATS if each.bytes == shape[2]), None)


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
        ValueError: as `Int4Format.shape`.
    """
    rows, k = weight.shape
    Int4Format(group, zero_points).shape(rows, k)
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
    """The float32 [rows, k] weight that values and scales stand for; exact where the scales are
    those of bfloat16 or float16."""
    rows, k = values.shape
    groups = values.view(rows, scales.shape[1], k // scales.shape[1]).float()
    if zero_points is not None:
        groups = groups - zero_points.float()[:, :, None]
    return (groups * scales.float()[:, :, None]).reshape(rows, k)


def pack_int4(values: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """The packed weight, uint8 [blocks, groups, bytes], of what `quantize_int4` returns; scales may
    be float32 too.

    Raises:
        ValueError: as `Int4Format.shape`.
    """
    rows, k = values.shape
    group = k // scales.shape[1]
    made = Int4Format(group, zero_points is not None, scales.dtype == torch.float32)
    blocks, count, size = made.shape(rows, k)
    packed = torch.zeros(blocks, count, size, dtype=torch.uint8)

    def columns(each: Tensor) -> Tensor:
        """[blocks, groups, 32] of [rows, groups]."""
        whole = each.new_zeros(blocks * BLOCK, *each.shape[1:])
        whole[:rows] = each
        return _whole(whole.view(blocks, BLOCK, count).transpose(1, 2))

    packed[:, :, : made.scale_bytes] = columns(scales).view(torch.uint8)
    if zero_points is not None:
        packed[:, :, made.scale_bytes : made.head_bytes] = columns(zero_points).view(torch.uint8)
    nibbles = values.new_zeros(blocks * BLOCK, k)
    nibbles[:rows] = values
    nibbles &= 15
    # [blocks, 32, groups, words, bytes, 2]: the two values of a byte last, the lower one first.
    eights = nibbles.view(blocks, BLOCK, count, group // 8, 8)[..., list(_ORDER)]
    pairs = eights.view(torch.uint8).view(blocks, BLOCK, count, group // 8, 4, 2)
    words = pairs[..., 0] | pairs[..., 1] << 4
    words = words.permute(0, 2, 3, 1, 4).reshape(blocks, count, size - made.head_bytes)
    packed[:, :, made.head_bytes :] = words
    return packed


def _whole(tensor: Tensor) -> Tensor:
    """A contiguous copy, also in its strides where it is empty."""
    return tensor.clone(memory_format=torch.contiguous_format)


def unpack_int4(packed: Tensor, rows: int, k: int) -> Tensor:
    """The float32 [rows, k] weight that a packed one stands for, by indexing."""
    blocks, count, _ = packed.shape
    made = int4_format(packed.shape)
    assert made is not None

    def columns(start: int, end: int, dtype: torch.dtype) -> Tensor:
        """[rows, groups] of what lies in each group."""
        each = _whole(packed[:, :, start:end]).view(dtype)
        return each.transpose(1, 2).reshape(blocks * BLOCK, count)[:rows]

    scales = columns(0, made.scale_bytes, torch.float32 if made.wide_scales else torch.bfloat16)
    zero_points = None
    if made.zero_points:
        zero_points = columns(made.scale_bytes, made.head_bytes, torch.int8)
    words = packed[:, :, made.head_bytes :].reshape(blocks, count, made.group // 8, BLOCK, 4)
    nibbles = torch.stack([words & 15, words >> 4], -1)
    nibbles = nibbles.reshape(blocks, count, made.group // 8, BLOCK, 8)
    order = torch.tensor(_ORDER).argsort()
    values = nibbles[..., order].permute(0, 3, 1, 2, 4).reshape(blocks * BLOCK, k)[:rows]
    values = torch.where(values > 7, values.to(torch.int8) - 16, values.to(torch.int8))
    return dequantize_int4(values, scales, zero_points)
