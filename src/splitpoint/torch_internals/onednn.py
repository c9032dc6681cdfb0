"""Linear layers by oneDNN, over weights in its own layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .probe import fits


def onednn_linear_available(dtype: torch.dtype) -> bool:
    """Whether oneDNN has linear layers over weights in its own layout for a dtype."""
    return (fits("oneDNN") and bool(torch._C._has_mkldnn)) and (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def onednn_pack(weight: torch.Tensor) -> torch.Tensor:
    """A [n, k] weight in oneDNN's own layout, an opaque tensor. The layout does not depend on
    the number of tokens in a way that could be measured."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., k] to [..., n] over a weight that `onednn_pack` made."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def prepacked_linear(
    weight: torch.Tensor,
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function [tokens, k] to [tokens, n] by oneDNN, over its own layout of a [n, k] weight;
    None when this torch has no oneDNN or it has no such layer for the dtype."""
    if not onednn_linear_available(weight.dtype):
        return None
    packed = onednn_pack(weight)
    return lambda x: onednn_linear(x, packed)


def onednn_linear_op() -> Any:
    """`onednn_linear` as an operator of its own: Inductor's lowering of the one beneath takes
    weights only as constants of the graph."""
    _onednn_library()
    return torch.ops.splitpoint_onednn.linear.default


@functools.cache  # a library unregisters what it defined when it is collected
def _onednn_library() -> torch.library.Library:
    library = torch.library.Library("splitpoint_onednn", "DEF")  # type: ignore[no-untyped-call]
    schema = "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"
    library.define(schema)  # type: ignore[no-untyped-call]
    # An opaque weight has a dispatch key of its own, which comes before CPU.
    for key in ("CPU", "MkldnnCPU"):
        library.impl("linear", onednn_linear, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(
        "splitpoint_onednn::linear",
        lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
        lib=library,
    )
    return library
