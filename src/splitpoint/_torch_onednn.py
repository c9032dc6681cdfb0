"""The private torch names of oneDNN's prepacked linear layers. Checked on torch 2.13.0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def prepacked_linear(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A function [tokens, k] -> [tokens, rows] by oneDNN, over its own layout of a [rows, k]
    weight; None when this torch has no oneDNN or it has no such layer for the dtype."""
    if not torch._C._has_mkldnn:
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    ops = torch.ops.mkldnn
    # The number of tokens is a hint that changes nothing measurable.
    packed = ops._reorder_linear_weight(weight, None)

    def call(x: Tensor) -> Tensor:
        y: Tensor = ops._linear_pointwise(x, packed, None, "none", [], "")
        return y

    return call
