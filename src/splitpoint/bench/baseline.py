"""What a baseline of `splitpoint bench forward` is, and what several of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import Activations, Weights
from .inputs import CompiledForward, call_each


@dataclass(frozen=True)
class Setting:
    """What all baselines are given."""

    model: Any
    """A causal language model of transformers, or what is called as one."""
    name: str = ""
    """What the command line calls it."""
    weights: Weights | None = None
    activations: Activations | None = None
    """What splitpoint was asked to round, which some can do as well."""
    threads: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        found: torch.dtype = self.model.dtype
        return found


@dataclass(frozen=True)
class Rounding:
    """What a baseline rounds in a way of its own: its outputs are compared with those of the model
    as it is, and may be off by what such rounding makes of them."""

    weights: Weights | None
    activations: Activations | None = None

    def __str__(self) -> str:
        return f"weights {self.weights}" + f", activations {self.activations}" * bool(
            self.activations
        )


class Built(Protocol):
    """What a baseline runs."""

    def __call__(self, ids: Tensor, /) -> Tensor:
        """As `inputs.Forward`."""

    def forget(self) -> None:
        """Free what outlives it; it must not be called after."""


@dataclass(frozen=True)
class Baseline:
    """One way to run a causal language model that is not this package's."""

    name: str
    about: str
    """What it is, for the legend of the table."""
    unavailable: Callable[[Setting], str | None]
    """Why it cannot run a model here, and what to do about it; None where it can."""
    prepare: Callable[[Setting], Any]
    """The model as `build` takes it; not part of the cost of compiling."""
    build: Callable[[Any, Sequence[int]], Built]
    """Compiles what `prepare` returned, by calling it at each of some sizes."""
    per_size: bool = False
    """Whether it is built anew for every size, as a static graph, and dropped after it."""
    free: Callable[[], None] | None = None
    """Frees what else outlives what `build` returned, of all that it returned so far."""
    rounds: Callable[[Setting], Rounding | None] = lambda setting: None
    """What it rounds in a way of its own; None where it has the model as it is."""

    def release(self, forward: Built) -> None:
        """Let go of what `build` returned, weights included; it must not be called after."""
        forward.forget()
        if self.free is not None:
            self.free()


def given(setting: Setting) -> Any:
    """The model, unchanged."""
    return setting.model


def build_dynamic(model: Any, sizes: Sequence[int]) -> CompiledForward:
    """`torch.compile(dynamic=True)` of a model."""
    forward = CompiledForward(model, dynamic=True, fullgraph=True)
    call_each(forward, sizes)
    return forward


def with_linear(model: Any, change: Callable[[str, nn.Linear], nn.Module | None]) -> Any:
    """A copy of a model with other linear layers, by what `change` makes of each and its name;
    where that is None, the layer stays. Everything else is the model's own."""
    # A parameter in the memo is not copied.
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, memo)
    for path, module in list(changed.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                made = change(f"{path}.{name}" if path else name, child)
                if made is not None:
                    setattr(module, name, made)
    return changed


PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""The dtypes that most can run."""
