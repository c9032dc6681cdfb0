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


LEAST_SCALE = 2.0**-120
"""The least scale of a row of x that is rounded to int8."""


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


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels over quads make of an x [..., k]: int8 values and a float32 scale [...] a
    row, with values * scale within scale / 2 of x.

    Every step is rounded to float32, as the kernels' are, so that values are the same. A row with
    a value that is not finite gets zeros, and NaN for its scale.
    """
    rows = x.float()
    largest = rows.abs().amax(-1) if x.shape[-1] else rows.new_zeros(x.shape[:-1])
    scale = (largest / 127).clamp_min(LEAST_SCALE)
    values = (rows * (1 / scale)[..., None]).round_()
    finite = largest.isfinite()
    values = torch.where(finite[..., None], values, 0.0).to(torch.int8)
    return values, torch.where(finite, scale, torch.nan)


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
