"""What tells linear layers apart for a choice of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Dtypes that kernels here take, x and weight alike, by the name they have in text."""


@dataclass(frozen=True)
class Shape:
    """Of the layers that get the same kernel."""

    columns: int
    k: int
    dtype: torch.dtype
    stays: bool = False
    """Whether the weight stays as it is, being an embedding's too."""

    def __str__(self) -> str:
        suffix = " of an embedding" if self.stays else ""
        return f"{self.columns}x{self.k} {TYPES[self.dtype]}{suffix}"

    @property
    def nbytes(self) -> int:
        """Bytes of a weight."""
        return self.columns * self.k * self.dtype.itemsize
