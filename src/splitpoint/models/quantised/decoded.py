"""What every format of quantised weights is decoded to, and the layer that is made of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import kernels
from ...errors import UnsupportedModel
from ...kernels.int4 import GROUPS, pack_int4
from ...kernels.memory import Streamed
from ...kernels.packed_linear import PackedLinear, scales_as_exact

BITS = (4, 8)
"""Bits of a value that there are kernels for."""


@dataclass(frozen=True)
class Decoded:
    """A quantised weight: weight[n, i] = (values[n, i] - zeros[n, g]) * scales[n, g], g being
    group_of[i]."""

    bits: int
    values: Tensor
    """int8 [n, k], from -2**(bits - 1) on."""
    scales: Tensor
    """[n, groups], float32, as exact as the format has them."""
    zeros: Tensor | None
    """int8 [n, groups], from -2**(bits - 1) on; None where all are 0."""
    group_of: Tensor
    """int64 [k]."""


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned values, uint8 [..., count * 32 / bits], of int32 words [..., count] that hold
    them from their lowest bits on."""
    found = words.contiguous().view(torch.uint8)
    if bits == 8:
        return found
    return torch.stack([found & 15, found >> 4], -1).flatten(-2)


def signed(values: Tensor, bits: int) -> Tensor:
    """Unsigned values, uint8, moved to int8 around 0: 0 becomes -2**(bits - 1)."""
    return (values ^ 128).view(torch.int8) if bits == 8 else values.to(torch.int8) - 8


def even_groups(k: int, size: int, count: int) -> Tensor:
    """The group of each of k columns, in groups of `size` (-1: one for all), of which there are
    `count`.

    Raises:
        UnsupportedModel: when there are not.
    """
    size = k if size == -1 else size
    if size < 1 or -(-k // size) != count:
        raise UnsupportedModel(
            f"{count} scales a row for {k} columns, in groups of {size}: the checkpoint "
            f"contradicts its quantization_config"
        )
    return torch.arange(k) // size


def packed_linear(weight: Decoded, bias: Tensor | None, memory: Streamed) -> nn.Module:
    """The layer that computes with a weight, exactly as it is: its scales are bfloat16 where all
    are, else float32. It lies in `memory`.

    Columns whose groups lie apart (`desc_act`) are brought together, and x is permuted alike.

    Raises:
        UnsupportedModel: for what the kernels do not have; the message names it.
    """
    values, group_of = weight.values, weight.group_of
    n, k = values.shape
    order = None
    if not bool((group_of[1:] >= group_of[:-1]).all()):
        order = group_of.argsort(stable=True)
        values, group_of = values[:, order], group_of[order]
    if bias is not None and not bool(bias.any()):
        bias = None  # some programs store zeros for layers that have none
    made = _packed4 if weight.bits == 4 else _packed8
    packed, scale = made(weight, values, group_of)
    return PackedLinear(memory.placed(packed), n, k, scale, bias, order)


def _packed4(weight: Decoded, values: Tensor, group_of: Tensor) -> tuple[Tensor, None]:
    k = len(group_of)
    fitting = (
        group for group in reversed(GROUPS) if k % group == 0 and _alike(group_of.view(-1, group))
    )
    group = next(fitting, None)
    if group is None:
        raise UnsupportedModel(
            f"{k} columns in groups of {int(group_of.bincount()[0])}: 4 bits need groups, and "
            f"columns, that are multiples of {GROUPS[0]}"
        )
    each = group_of[::group]
    zeros = None if weight.zeros is None else weight.zeros[:, each]
    if zeros is not None and not bool(zeros.any()):
        zeros = None
    return pack_int4(values, scales_as_exact(weight.scales[:, each]), zeros), None


def _packed8(weight: Decoded, values: Tensor, group_of: Tensor) -> tuple[Tensor, Tensor]:
    if not _alike(weight.scales):
        raise UnsupportedModel(
            f"8 bits with {weight.scales.shape[1]} scales a row: 8 bits need one scale a row"
        )
    if weight.zeros is not None and bool(weight.zeros.any()):
        raise UnsupportedModel("8 bits with zero points: 8 bits need to be symmetric")
    kernels.load()
    packed: Tensor = torch.ops.splitpoint.pack_weight(values.contiguous())
    return packed, weight.scales[:, 0].float().contiguous()


def _alike(rows: Tensor) -> bool:
    """Whether all of each row is the same."""
    return bool((rows == rows[:, :1]).all())
