"""How far a correct kernel may be from the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import ACTIVATIONS, finish, linear, quantised_rows

U32 = 2.0**-24
"""Unit roundoff of float32: half a unit in the last of 24 places."""

ROUNDOFF = {torch.float32: U32, torch.bfloat16: 2.0**-8}

TINY = 1e-36

SLOPE = 1.13
"""The steepest that silu (1.10) and both gelus (1.13) get, so by how much they can widen an
error of what goes into them."""


def bounds(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    off: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The largest error of each output, for sums in float32 in any order.

    A sum of k products in float32, in whatever order, with or without fused multiply-adds, is
    off by at most (k + 1) u sum|x w| to first order (Higham, Accuracy and Stability, 3.1; the
    bf16 and int8 products themselves are exact in float32). vdpbf16ps rounds after each product
    too and takes subnormals as zero, which TINY covers. Scaling and the bias round once each.
    `off`, [n, k] for each weight, is how far a kernel may take its values to be from what they are.
    """
    return Expected.of(
        x,
        weights,
        scales=scales,
        biases=biases,
        residual=residual,
        activation=activation,
        gated=gated,
        off=off,
    ).allowed


def _bounds(
    exact: Sequence[Tensor],
    befores: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    activation: str,
    gated: bool,
    off: Sequence[Tensor],
    dtype: torch.dtype,
    exact_sums: bool,
) -> list[Tensor]:
    """`bounds`, for results that are `exact` and, `before` the activation, these."""
    errors = []
    for index, weight in enumerate(weights):
        if exact_sums:
            magnitude = (x.double() @ weight.double().t()).abs()
        else:
            magnitude = x.double().abs() @ weight.double().abs().t()
        if scales:
            magnitude = magnitude * scales[index].double()
        if biases:
            magnitude = magnitude + biases[index].double().abs()
        # An exact sum is rounded to float32, and once more as it meets each scale and the bias.
        roundings = 4 if exact_sums else x.shape[-1] + 4
        errors.append(roundings * U32 * magnitude + TINY)
        if off:
            moved = x.double().abs() @ off[index].double().t()
            errors[-1] += moved * scales[index].double() if scales else moved
    activated = [
        _activated_error(activation, before, error)
        for before, error in zip(befores, errors, strict=True)
    ]
    if gated:
        gate = ACTIVATIONS[activation](befores[0]).abs()
        activated = [activated[0] * (befores[1].abs() + errors[1]) + gate * errors[1]]
        activated[0] += U32 * (gate * befores[1]).abs()
    result = []
    for error, value in zip(activated, exact, strict=True):
        if residual is not None:
            error = error + U32 * value.abs()
        # Rounding to the output dtype, of a value that is itself off by `error`.
        result.append(error + ROUNDOFF[dtype] * (value.abs() + error))
    return result


def _activated_error(activation: str, before: Tensor, error: Tensor) -> Tensor:
    if activation == "silu":
        # exp is good to 2 ulp; with the sum and the quotient that is below 8 u.
        return SLOPE * error + 8 * U32 * ACTIVATIONS["silu"](before).abs() + TINY
    if activation == "gelu_tanh":
        # As silu; and the argument of exp, itself rounded five times, shifts the result by at
        # most |x| max|z s'(z)| 5 u = 1.2 u |x| with s the logistic function.
        return SLOPE * error + 10 * U32 * before.abs() + TINY
    if activation == "gelu":
        # Abramowitz and Stegun 7.1.26 is off by 1.5e-7, of which Phi takes half; the rest is
        # its polynomial's own rounding, whose terms add up to below 4 in magnitude.
        return SLOPE * error + (0.75e-7 + 10 * U32) * before.abs() + TINY
    return error


@dataclass(frozen=True)
class Expected:
    """What outputs should be, in float64, and how far each may be off."""

    exact: list[Tensor]
    allowed: list[Tensor]
    dtype: torch.dtype

    @staticmethod
    def of(
        x: Tensor,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor] = (),
        biases: Sequence[Tensor] = (),
        residual: Tensor | None = None,
        activation: str = "none",
        gated: bool = False,
        off: Sequence[Tensor] = (),
        rounds_x: bool = False,
        exact_sums: bool = False,
    ) -> Expected:
        """For inputs and weights as for `linear`, and `off` as for `bounds`. With `rounds_x` of an
        x rounded to int8 (`quantised_rows`); with `exact_sums` its products with int8 weights are
        summed exactly.
        """
        dtype = x.dtype
        if rounds_x:
            values, row_scales = quantised_rows(x)
            x = values.double() * row_scales.double()[..., None]
        befores = linear(x, weights, scales, biases)
        exact = finish(befores, residual, activation, gated)
        allowed = _bounds(
            exact,
            befores,
            x,
            weights,
            scales,
            biases,
            residual,
            activation,
            gated,
            off,
            dtype,
            exact_sums,
        )
        return Expected(exact, allowed, dtype)

    def exceeded(self, ys: Sequence[Tensor]) -> float:
        """The worst error of outputs as a multiple of its bound; infinite where one is no
        number."""
        worst = 0.0
        for y, value, most in zip(ys, self.exact, self.allowed, strict=True):
            assert y.shape == value.shape, f"{tuple(y.shape)} is not {tuple(value.shape)}"
            assert y.dtype == self.dtype, f"{y.dtype} is not {self.dtype}"
            share = ((y.double() - value).abs() / most).nan_to_num(nan=torch.inf)
            worst = max(worst, float(share.amax())) if share.numel() else worst
        return worst


def exceeded(ys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], **rest: Any) -> float:
    """`Expected.exceeded` for outputs that are looked at once."""
    return Expected.of(x, weights, **rest).exceeded(ys)
