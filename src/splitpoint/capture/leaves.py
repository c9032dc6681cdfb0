"""The leaves of a call's arguments: tensors, the size itself, and constants."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..torch_internals.dynamo import mark_dynamic

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of arguments that are compared by value; all others by identity."""


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor among the arguments."""

    path: str
    """How messages name it, for example `batch['ids']`."""
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Both as at the first call."""
    dims: tuple[int, ...]
    """The dynamic dimensions."""
    which: tuple[int, ...]
    """Which of a `Dims` each of them is."""

    @property
    def dynamic(self) -> dict[int, int]:
        """Which of a `Dims` each dynamic dimension is."""
        return dict(zip(self.dims, self.which, strict=True))

    def shape_at(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """The shape for lengths of the dynamic dimensions."""
        dynamic = self.dynamic
        return tuple(lengths[dynamic[d]] if d in dynamic else n for d, n in enumerate(self.shape))

    def described(self, names: Sequence[str]) -> str:
        """The shape with names for the dynamic dimensions."""
        dynamic = self.dynamic
        shown = [names[dynamic[d]] if d in dynamic else str(n) for d, n in enumerate(self.shape)]
        return f"[{', '.join(shown)}]"

    def strides_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of this layout at another size: those of dimensions outside a dynamic
        one in memory grow with it."""
        if self.strides == _contiguous(self.shape):
            return _contiguous(shape)
        strides = list(self.strides)
        for dim in self.dims:
            if self.shape[dim] == 1 == shape[dim]:
                continue
            outer = self.strides[dim] * self.shape[dim]
            for other, stride in enumerate(self.strides):
                if other != dim and outer and stride >= outer and stride % outer == 0:
                    scale = shape[dim] * strides[dim]
                    strides[other] = strides[other] // outer * scale
        return tuple(strides)

    def stride_at(self, dim: int, count: int) -> tuple[int, tuple[int, ...]]:
        """(c, powers) such that the stride of a dimension is c times the product of the `count`
        lengths to these powers."""
        lengths = [2] * count
        base = self.strides_for(self.shape_at(lengths))[dim]
        powers = []
        for index in range(count):
            longer = [*lengths[:index], 4, *lengths[index + 1 :]]
            ratio = self.strides_for(self.shape_at(longer))[dim] // base if base else 1
            powers.append(ratio.bit_length() - 1)
        return base >> sum(powers), tuple(powers)

    def example(self, lengths: Sequence[int], symbolic: Collection[int]) -> torch.Tensor:
        """A fresh tensor of this kind for lengths of the dynamic dimensions; its contents are
        undefined."""
        shape = self.shape_at(lengths)
        tensor = torch.empty_strided(
            shape, self.strides_for(shape), dtype=self.dtype, device=self.device
        )
        for dim, which in self.dynamic.items():
            if which in symbolic:
                mark_dynamic(tensor, dim)
        return tensor


@dataclass(frozen=True)
class SizeLeaf:
    """An integer argument that is a dynamic dimension."""

    path: str
    which: int = 0
    """Which of a `Dims`."""


@dataclass(frozen=True)
class ConstantLeaf:
    """Any other argument: part of what was captured, so it must stay the same."""

    path: str
    value: Any


Leaf = TensorLeaf | SizeLeaf | ConstantLeaf


def same_constant(a: object, b: object) -> bool:
    """Whether a graph that was captured with one constant is right for another."""
    return a is b or (isinstance(a, PLAIN) and type(a) is type(b) and repr(a) == repr(b))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)
