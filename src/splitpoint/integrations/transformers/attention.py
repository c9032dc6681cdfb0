"""Attention over the paged cache, by transformers' registries of attention functions and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import UnsupportedModel
from ...kernels import load

NAME = "splitpoint_paged"
"""What a configuration names the function by."""

CACHE, STEPS, TABLES = "splitpoint_cache", "splitpoint_steps", "splitpoint_tables"
"""Keyword arguments of a model's forward, which it passes on to each attention layer."""

_REFUSED = ("s_aux", "position_bias", "alibi", "head_mask")
"""What attention functions may be given that changes the result and is not known here."""


def register() -> None:
    """Make the function known to transformers; load the operator."""
    load()
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, no_mask)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Append a step's keys and values to the cache and attend over what each sequence holds.

    query is [1, heads, tokens, size], keys and values [1, kv_heads, tokens, size].

    Raises:
        UnsupportedModel: when a model asks for what this does not do.
    """
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise UnsupportedModel(
            f"{type(module).__name__} attends with a mask of its own, and the paged cache is for "
            f"causal attention: leave this model to transformers"
        )
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} passes {name} to its attention, which the paged cache "
                f"does not know: leave this model to transformers"
            )
    if CACHE not in kwargs:
        raise UnsupportedModel(
            f"{type(module).__name__} is not given what its model's forward was: leave this model "
            f"to transformers"
        )
    cache = kwargs[CACHE]
    if not key.shape[1::2] == value.shape[1::2] == cache.shape[3::2]:
        raise UnsupportedModel(
            f"{type(module).__name__} has keys of {key.shape[1]} heads of {key.shape[3]} and "
            f"values of {value.shape[1]} of {value.shape[3]}, and by its configuration they are "
            f"{cache.shape[3]} of {cache.shape[5]}: leave this model to transformers"
        )
    result = torch.ops.splitpoint.cached_attention(
        query,
        key,
        value,
        cache,
        kwargs[STEPS],
        kwargs[TABLES],
        layer=module.layer_idx,
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
    )
    return result, None


def no_mask(*args: Any, use_vmap: bool = False, **kwargs: Any) -> None:
    """No mask: the operator knows which keys each token may see.

    Raises:
        UnsupportedModel: for a model that adds to the causal mask.
    """
    if use_vmap:  # how transformers makes masks that a model has its own functions for
        raise UnsupportedModel(
            "the model adds to the causal mask, and the paged cache is for causal attention: leave "
            "this model to transformers"
        )
