"""The operators without data: the shapes that tracing and compiling see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import packed_shape


def register_fakes() -> None:
    """Give the loaded operators their fake implementations. Call once."""
    torch.library.register_fake("splitpoint::pack_weight", _pack_weight)
    torch.library.register_fake("splitpoint::unpack_weight", _unpack_weight)
    torch.library.register_fake("splitpoint::linear_packed", _linear_packed)
    torch.library.register_fake("splitpoint::linear_gemv", _linear_gemv)
    torch.library.register_fake("splitpoint::attention", _attention)
    torch.library.register_fake("splitpoint::cached_attention", _cached_attention)


def _pack_weight(weight: Tensor) -> Tensor:
    rows, k = weight.shape
    return weight.new_empty(packed_shape(rows, k, weight.dtype))


def _unpack_weight(
    packed: Tensor, scale: Tensor | None, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(k, n, dtype=dtype)


def _linear_packed(
    x: Tensor,
    weights: Sequence[Tensor],
    n: Sequence[int],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    batch_invariant: bool = False,
    round_x: bool = False,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], columns)) for columns in (n[:1] if gated else n)]


def _linear_gemv(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> list[Tensor]:
    each = weights[:1] if gated else weights
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in each]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rows_outside: bool = False,
    blockwise: bool = False,
) -> Tensor:
    batch, heads, rows, _ = query.shape
    if rows_outside:
        return query.new_empty(batch, rows, heads, value.shape[3]).transpose(1, 2)
    return query.new_empty(batch, heads, rows, value.shape[3])


def _cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    steps: Tensor,
    tables: Tensor,
    *,
    layer: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    batch, heads, tokens, size = query.shape
    return query.new_empty(batch, tokens, heads, size)
