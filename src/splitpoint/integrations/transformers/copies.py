"""A model's parts with another configuration, over the same weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

try:
    from transformers.utils import output_capturing
except ImportError:  # other versions of transformers may not have it
    output_capturing = None

from .attention import CACHE, STEPS, TABLES


def with_config(module: nn.Module, configs: dict[int, Any]) -> Any:
    """A copy of a module tree whose modules have other configurations (by the id of their own) and
    the same parameters and buffers, also those that are replaced later."""
    copies: dict[int, nn.Module] = {}

    def copied(each: nn.Module) -> nn.Module:
        if id(each) in copies:
            return copies[id(each)]
        other = copies[id(each)] = copy.copy(each)
        own = other.__dict__
        own["_parameters"], own["_buffers"] = each._parameters, each._buffers
        own["_modules"] = {
            name: None if child is None else copied(child) for name, child in each._modules.items()
        }
        for name, value in own.items():
            if id(value) in configs:
                own[name] = configs[id(value)]
        own.pop("forward", None)  # one that was put in place of the class's
        return other

    return copied(module)


def install_hooks(inner: nn.Module) -> None:
    """Have transformers put its hooks for hidden states and attentions on a model's layers now.

    It does so at the first call that asks for them, and they stay: a model that was captured
    before has changed then. They do nothing in other calls.
    """
    install = getattr(output_capturing, "maybe_install_capturing_hooks", None)
    if install is not None:
        install(inner)


class States:
    """What a body returns, of whichever class: hidden states, and nothing else."""

    past_key_values = hidden_states = attentions = cross_attentions = router_logits = None
    cache = None  # what transformers 5.24 calls past_key_values

    def __init__(self, last_hidden_state: Any) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]


class Given(nn.Module):
    """In place of a model's body: hidden states that were computed before."""

    def forward(self, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> States:
        """What the body would return."""
        return States(inputs_embeds)


class Body(nn.Module):
    """A model up to its last hidden states, for tokens of many sequences in one row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, input_ids: Any, position_ids: Any, cache: Any, steps: Any, tables: Any
    ) -> Any:
        """[1, tokens] token numbers and positions, and what `cached_attention` takes; [1, tokens,
        hidden]."""
        result = self.inner(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            **{CACHE: cache, STEPS: steps, TABLES: tables},
        )
        return result.last_hidden_state


class Head(nn.Module):
    """What a model does with its last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Any) -> Any:
        """[rows, hidden] to [rows, vocabulary]."""
        return self.model(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
