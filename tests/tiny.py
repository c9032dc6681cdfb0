"""A causal language model small enough to make, save and compile in a test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, VOCABULARY = 3, 32, 128


def config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**sizes | changes)


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(**changes)).to(dtype).eval().requires_grad_(False)


class Logits(NamedTuple):
    logits: torch.Tensor


class OneLinear(nn.Module):
    """Called as a causal language model is, with one linear layer to compile."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, dtype=dtype)
        self.head = nn.Linear(HIDDEN, VOCABULARY, dtype=dtype)
        self.eval().requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Logits:
        return Logits(self.head(self.embedding(input_ids).cumsum(1))[:, -logits_to_keep:])


def save(folder: Path, **changes: Any) -> Path:
    model(**changes).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "a": 1, "b": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<end>")), eos_token="<end>"
    ).save_pretrained(folder)
