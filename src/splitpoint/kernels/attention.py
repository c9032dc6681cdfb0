"""Attention in plain torch and float64, and how far a correct kernel may be from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bounds import ROUNDOFF, TINY, U32


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    """softmax(query @ key^T * scale + mask) @ value in float64, where a query that no key is left
    for gets zero.

    query is [batch, heads, queries, size], key [batch, kv_heads, keys, size], value [batch,
    kv_heads, keys, value_size]; heads are a multiple of kv_heads. The mask broadcasts to [batch,
    heads, queries, keys]; a boolean one keeps what is true, any other is added.
    """
    scores, _ = _scores(query, key, attn_mask, is_causal, scale)
    return _weights(scores) @ _shared(value, query)


def bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    blockwise: bool = False,
) -> Tensor:
    """The largest error of each output, for sums in float32 in any order.

    To first order: a score is off by (size + 2) u sum|q k| (see `bounds.bounds`), and by the
    roundings of scaling, adding the mask and taking the row's largest score off. A weight is e to
    that, to 2 ulp; with d the row's largest error of a score, weights and their sum are off by
    factors within e^d, so that the output is off by at most e^(2 d) - 1, and what summing rounds,
    of the weighted sum of |value|. Where the softmax is made block by block, each block rounds what
    was summed before by one more factor, of which there are fewer than keys / 4, and weights of
    bfloat16 inputs may be rounded to bfloat16 before they meet the values.
    """
    return _exact_and_bounds(query, key, value, attn_mask, is_causal, scale, None, blockwise)[1]


def _exact_and_bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    only: Tensor | None,
    blockwise: bool,
) -> tuple[Tensor, Tensor]:
    """The reference and its bounds, of the queries `only`."""
    scores, magnitude = _scores(query, key, mask, is_causal, scale, only)
    weights, values = _weights(scores), _shared(value, query)
    exact = weights @ values
    keys = key.shape[2]
    if keys == 0:
        return exact, torch.full_like(exact, TINY)
    seen = ~scores.isneginf()
    finite = scores.masked_fill(~seen, 0.0).abs()
    wrong = (query.shape[3] + 4) * U32 * magnitude + 2 * U32 * finite
    most = wrong.masked_fill(~seen, 0.0).amax(-1, keepdim=True)
    # The largest score and what it is taken off round once.
    most = most + U32 * 2 * finite.amax(-1, keepdim=True)
    share = torch.expm1(2 * most) + (2 * keys + 16) * U32
    if blockwise:
        share = share + (2 * keys + 16) * U32
        share = share + (ROUNDOFF[query.dtype] if query.dtype == torch.bfloat16 else 0)
    error = share * (weights @ values.abs()) + keys * TINY * (1 + values.abs().amax(-2, True))
    return exact, error + ROUNDOFF[query.dtype] * (exact.abs() + error)


def exceeded(
    y: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    only: Tensor | None = None,
    blockwise: bool = False,
) -> float:
    """The worst error of an output as a multiple of its bound; infinite where it is no number.

    `only` are the numbers of the queries to compare (int64), None for all of them.
    """
    shape = (*query.shape[:3], value.shape[3])
    assert y.shape == shape, f"{tuple(y.shape)} is not {shape}"
    assert y.dtype == query.dtype, f"{y.dtype} is not {query.dtype}"
    exact, most = _exact_and_bounds(query, key, value, attn_mask, is_causal, scale, only, blockwise)
    y = y if only is None else y[:, :, only]
    share = ((y.double() - exact).abs() / most).nan_to_num(nan=torch.inf)
    return float(share.amax()) if share.numel() else 0.0


def _shared(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values in float64, once for each head of the query."""
    kv_heads = tensor.shape[1]
    times = query.shape[1] // kv_heads if kv_heads else 1
    return tensor.double().repeat_interleave(times, 1)


def _scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    only: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores after the mask, and the sums of the magnitudes of what is summed and scaled."""
    factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    numbers = torch.arange(query.shape[2]) if only is None else only
    if only is not None:
        query = query[:, :, only]
        mask = mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., only, :]
    keys = _shared(key, query).transpose(-1, -2)
    scores = query.double() @ keys * factor
    magnitude = query.double().abs() @ keys.abs() * abs(factor)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        magnitude = magnitude + mask.double().abs().nan_to_num(posinf=0.0)
        scores = scores + mask.double()
    if is_causal:
        later = torch.arange(scores.shape[-1]) > numbers[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    return scores, magnitude


def _weights(scores: Tensor) -> Tensor:
    return scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
