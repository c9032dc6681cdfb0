"""A model that computes with rounded weights for a while, to compare with what was compiled so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...config import Activations, Weights
from ...kernels.packed_linear import PackedLinear
from ...kernels.reference import quantised_rows
from ...passes.linear import rounded

HEAD: Weights = "int8"
"""What the head's weight is rounded to whatever is asked for: its errors go into each token's
choice, and most of what 4 bits lose is lost there."""


@contextmanager
def rounding(
    model: Any,
    weights: Weights | None,
    keep: bool = False,
    activations: Activations | None = None,
) -> Iterator[None]:
    """Have the linear layers of a model use rounded weights while they run; its own are back after
    each. They are made one layer at a time and dropped, unless they are to be kept for the next
    call. Without `weights` they stay as they are. With `activations` all of them round their
    input as well: a compiled model does so in some ranges, so that this is about how far it may be
    off."""
    head = None if weights is None else model.get_output_embeddings()
    held: dict[nn.Module, nn.Parameter] = {}
    made: dict[nn.Module, nn.Parameter] = {}

    def round_rows(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        values, scale = quantised_rows(given[0])
        return ((values * scale[..., None]).to(given[0].dtype), *given[1:])

    def before(module: Any, _: Any) -> None:
        held[module] = module.weight
        module._parameters["weight"] = made[module] if module in made else of(module)
        if keep:
            made[module] = module.weight

    def of(module: Any) -> nn.Parameter:
        own, kind = module.weight, HEAD if module is head else weights
        assert kind is not None
        is_turned = isinstance(module, Conv1D)
        values = rounded(own.detach().t() if is_turned else own.detach(), kind).to(own.dtype)
        values = values.t() if is_turned else values
        return nn.Parameter(values, requires_grad=False)

    def after(module: Any, *_: Any) -> None:
        module._parameters["weight"] = held.pop(module)

    handles = []
    if activations is not None:
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D, PackedLinear):
                handles.append(module.register_forward_pre_hook(round_rows))
    if weights is not None:
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D):
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
