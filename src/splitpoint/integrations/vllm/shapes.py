"""What tells linear layers apart for a choice of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...config import Activations, Weights
from ...kernels.int4 import int4_group

Other = Literal["vLLM", "unpacked", "x in int8"]
"""A layer by vLLM's own kernel, over a rounded weight that is unpacked at each call, or over a
rounded weight with x rounded too."""

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
    weights: Weights | None = None
    """What kernels round it to; None where they take it as it is."""
    activations: Activations | None = None
    """What kernels may round x to; only beside weights that are rounded."""

    def __str__(self) -> str:
        kind = f" in {self.weights}" if self.weights else ""
        suffix = " of an embedding" if self.stays else ""
        return f"{self.columns}x{self.k} {TYPES[self.dtype]}{kind}{suffix}"

    @property
    def key(self) -> str:
        """What tells its measurements from others."""
        return f"{self}, x in {self.activations}" if self.activations else str(self)

    @property
    def nbytes(self) -> int:
        """Bytes of a weight."""
        return self.columns * self.k * self.dtype.itemsize

    @property
    def other(self) -> Other:
        """What there is beside this package's kernel over x as it is."""
        if self.weights is None:
            return "vLLM"
        return "unpacked" if self.activations is None else "x in int8"

    @property
    def second_bytes(self) -> int:
        """Bytes of the copy that the other way needs for itself."""
        if self.weights is None:
            return self.nbytes
        return self.columns * self.k if self.weights == "int8" and self.activations else 0


HEAD: Weights = "int8"
"""What the weight of an LM head is rounded to whatever is asked for: its errors go into each
token's choice, and most of what 4 bits lose is lost there."""

INT4_NEEDS = "int4 needs inputs in multiples of 32"


def kind_for(weights: Weights | None, k: int, is_head: bool) -> Weights | None:
    """What a [n, k] weight is rounded to where `weights` is asked for; None where it stays."""
    kind = HEAD if weights is not None and is_head else weights
    return None if kind == "int4" and int4_group(k) is None else kind
