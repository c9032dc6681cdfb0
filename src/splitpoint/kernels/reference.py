"""The kernels' operators in plain torch and float64: what the C++ must agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BLOCK, packed_shape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
"""What may follow the product; "gelu" is the exact one by erf."""


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> list[Tensor]:
    """activation((x @ weight^T) * scale + bias) + residual for each weight, in float64; if gated,
    activation(product of the first weight) * product of the second + residual.

    x is [..., k], a weight the unpacked [n, k], its scale and bias [n]; a result and the
    residual are [..., n].
    """
    products = [x.double() @ weight.double().t() for weight in weights]
    if scales:
        products = [y * scale.double() for y, scale in zip(products, scales, strict=True)]
    if biases:
        products = [y + bias.double() for y, bias in zip(products, biases, strict=True)]
    return finish(products, residual, activation, gated)


def finish(
    products: Sequence[Tensor], residual: Tensor | None, activation: str, gated: bool
) -> list[Tensor]:
    """What `linear` makes of its products, scaled and with their biases."""
    if gated:
        gate, up = products
        results = [ACTIVATIONS[activation](gate) * up]
    else:
        results = [ACTIVATIONS[activation](y) for y in products]
    return results if residual is None else [y + residual.double() for y in results]


def pack_weight(weight: Tensor) -> Tensor:
    """The packed layout (see `layout`) of a [rows, k] weight, by indexing."""
    rows, k = weight.shape
    shape = packed_shape(rows, k, weight.dtype)
    padded_k = shape[1] * (2 if weight.dtype == torch.bfloat16 else 1)
    full = weight.new_zeros(shape[0] * BLOCK, padded_k)
    full[:rows, :k] = weight
    by_block = full.view(shape[0], BLOCK, padded_k)
    if weight.dtype == torch.bfloat16:
        return by_block.view(shape[0], BLOCK, shape[1], 2).transpose(1, 2).contiguous()
    return by_block.transpose(1, 2).contiguous()
