"""Values that recorded sizes are tried with, and when two results are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far results of kernels for different sizes may be apart, as a part of the largest."""


def repeated(tensor: Tensor, dims: Sequence[int], size: int, wanted: int) -> Tensor:
    """A tensor of another size with the rows of one, again and again: whatever the model asks of
    its arguments, these have it."""
    rows = torch.arange(wanted, device=tensor.device) % size
    for dim in dims:
        tensor = tensor.index_select(dim, rows)
    return tensor


def poison(tensor: Tensor) -> None:
    """Write over a result."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(1)


def something_else(tensor: Tensor) -> Tensor:
    """Other values, which are as good as arguments: 0 and 1 among integers."""
    if tensor.dtype is torch.bool:
        return ~tensor
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return 1 - tensor / 2
    return (tensor == 0).to(tensor.dtype)


def is_same(one: Any, other: Any) -> bool:
    """Whether results are the same to the last bit; NaN is NaN."""
    if not isinstance(one, Tensor):
        return bool(one == other)
    return one.shape == other.shape and bool(
        ((one == other) | ((one != one) & (other != other))).all()
    )


def is_close(one: Any, other: Any) -> bool:
    """Whether results are the same but for the order of sums."""
    if not isinstance(one, Tensor) or one.dtype not in CLOSE or one.numel() == 0:
        return is_same(one, other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    close = CLOSE[one.dtype]
    one, other = one.double(), other.double()
    finite = torch.isfinite(other)
    if not is_same(one.masked_fill(finite, 0), other.masked_fill(finite, 0)):
        return False
    one, other = one.masked_fill(~finite, 0), other.masked_fill(~finite, 0)
    return bool((one - other).abs().max() <= close * other.abs().max())
