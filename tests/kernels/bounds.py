"""How far a correct kernel may be from the float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor

from splitpoint.kernels.reference import linear

U32 = 2.0**-24
"""Unit roundoff of float32: half a unit in the last of 24 places."""

ROUNDOFF = {torch.float32: U32, torch.bfloat16: 2.0**-8}

SLOPE = 1.13
"""The steepest that silu (1.10) and both gelus (1.13) get, so by how much they can widen an
error of what goes into them."""


def bound(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The largest error of each output, for sums in float32 in any order.

    A sum of k products in float32, in whatever order, with or without fused multiply-adds, is
    off by at most (k + 1) u sum|x w| to first order (Higham, Accuracy and Stability, 3.1; the
    bf16 and int8 products themselves are exact in float32). vdpbf16ps rounds after each product
    too and takes subnormals as zero, which TINY covers. Scaling and the bias round once each.
    """
    tiny = 1e-36
    magnitude = x.double().abs() @ weight.double().abs().t()
    if scale is not None:
        magnitude = magnitude * scale.double()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    error = (x.shape[1] + 4) * U32 * magnitude + tiny
    before = linear(x, weight, scale, bias)
    if activation == "silu_mul":
        gate, up = before.chunk(2, dim=1)
        gate_error, up_error = error.chunk(2, dim=1)
        # exp is good to 2 ulp; with the sum, the quotient and the product that is below 8 u.
        gated = torch.nn.functional.silu(gate).abs()
        gate_error = SLOPE * gate_error + 8 * U32 * gated
        error = gate_error * (up.abs() + up_error) + gated * up_error + tiny
    elif activation == "gelu_tanh":
        # As silu; and the argument of exp, itself rounded five times, shifts the result by at
        # most |x| max|z s'(z)| 5 u = 1.2 u |x| with s the logistic function.
        error = SLOPE * error + 10 * U32 * before.abs() + tiny
    elif activation == "gelu":
        # Abramowitz and Stegun 7.1.26 is off by 1.5e-7, of which Phi takes half; the rest is
        # its polynomial's own rounding, whose terms add up to below 4 in magnitude.
        error = SLOPE * error + (0.75e-7 + 10 * U32) * before.abs() + tiny
    exact = linear(x, weight, scale, bias, residual, activation)
    if residual is not None:
        error = error + U32 * exact.abs()
    # Rounding to the output dtype, of a value that is itself off by `error`.
    return error + ROUNDOFF[x.dtype] * (exact.abs() + error)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, **rest: object) -> None:
    """Fail unless every output is finite and within its bound."""
    exact = linear(x, weight, **rest)  # type: ignore[arg-type]
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    error = (y.double() - exact).abs()
    share = error / bound(x, weight, **rest)  # type: ignore[arg-type]
    assert bool((share <= 1).all()), (
        f"worst error is {share.nan_to_num(nan=torch.inf).max():.3g} times its bound"
    )
