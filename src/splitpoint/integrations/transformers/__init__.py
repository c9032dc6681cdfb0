"""transformers: the same model, made fast in place.

import splitpoint.integrations.transformers as sp

sp.compile(model)
model.generate(...)
sp.undo(model)

model = sp.load("a-checkpoint-of-4-bits")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...config import Config
from ...errors import ConfigError, UnsupportedModel
from ...models import catalogue
from .decoder import Decoder
from .memory import default_cache_tokens

CONFIG = Config(max_size=512, split_points=(8, 64), compile_sizes=(1,))
"""What is compiled unless something else is asked for: a step of one token, of a few sequences,
and parts of prompts."""


def load(name: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model ready for inference, from a folder or a hub id.

    As transformers' `AutoModelForCausalLM.from_pretrained`, but weights that a checkpoint holds in
    4 or 8 bits (GPTQ, AWQ, compressed-tensors) stay so, without the packages that transformers
    needs for them: their layers are `kernels.packed_linear.PackedLinear`, in each dtype exactly
    what the checkpoint says.

    Args:
        name: a folder in Hugging Face's format, or a hub id.
        dtype: of all else, and of what is computed: float32 or bfloat16.

    Raises:
        ModelNotFound: when there is no such model.
        UnsupportedModel: when its weights are quantised in a way that is not taken; the message
            names it.
    """
    return catalogue.load(str(name), dtype)[0]


def compile(
    model: Any,
    config: Config | None = None,
    *,
    max_cache_tokens: int | None = None,
    max_sequences: int = 256,
) -> Any:
    """Make a causal language model of transformers fast, in place.

    `generate` (greedy, sampling, beams, padded batches, assisted decoding), several turns on one
    cache, pipelines and plain calls go on as before. The size that picks a range is the number of
    tokens of a step: sequences times new tokens. Prompts go in parts of at most `config.max_size`.

    Args:
        model: a `...ForCausalLM` on CPU, in float32 or bfloat16.
        config: the ranges and what they are given; `CONFIG` by default.
        max_cache_tokens: what the cache of keys and values holds at most, in all sequences. By
            default as much as fits into a quarter of the memory. It takes memory as it is filled.
        max_sequences: how many sequences may be in the cache at once.

    Returns:
        The model.

    Raises:
        UnsupportedModel: when it is no such model. What the paged cache cannot serve is found at
            the first call, whose logits are compared with the model's own.
        ConfigError: when the model is compiled already.
    """
    if isinstance(getattr(model.__dict__.get("forward"), "__self__", None), Decoder):
        raise ConfigError("this model is compiled already: call undo(model) first")
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} is no causal language model: compile it with "
            f"splitpoint.compile"
        )
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModel(
            f"the paged cache is for float32 and bfloat16 on CPU, and this {type(model).__name__} "
            f"is {model.dtype} on {model.device}: leave it to transformers"
        )
    tokens = max_cache_tokens or default_cache_tokens(model)
    decoder = Decoder(model, config or CONFIG, max_cache_tokens=tokens, max_sequences=max_sequences)
    model.forward = decoder.forward
    return model


def undo(model: Any) -> Any:
    """Make a model what it was before `compile`; caches that it filled meanwhile are of no use to
    it. Returns the model.

    Raises:
        ConfigError: when it is not compiled.
    """
    decoder_of(model)
    del model.forward
    return model


def repack(model: Any) -> Any:
    """Have a compiled model use weights as they are now, after updates that torch does not count
    (`splitpoint.CompiledModel.repack`). Returns the model.

    Raises:
        ConfigError: when it is not compiled.
    """
    decoder = decoder_of(model)
    decoder.body.repack()
    decoder.head.repack()
    return model


def decoder_of(model: Any) -> Decoder:
    """What serves a compiled model: its parts, plans and counters.

    Raises:
        ConfigError: when it is not compiled.
    """
    decoder = getattr(model.__dict__.get("forward"), "__self__", None)
    if not isinstance(decoder, Decoder):
        raise ConfigError("this model is not compiled: call compile(model) first")
    return decoder
