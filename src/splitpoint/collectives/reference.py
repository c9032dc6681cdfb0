"""The collectives in plain torch over any process group: what every backend must agree with.

`finish` is the local half, what follows the sum over the ranks, one torch operation after the
other; the quantisations are defined here, to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidCollective
from ..torch_internals import distributed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that the operators sum."""

QUANTS = ("none", "fp8_static", "fp8_token", "nvfp4")
"""Quantisations of the norm; see `quantise`."""

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
FP4_LARGEST = 6.0
FP4_BLOCK = 16
"""Neighbouring values that share one nvfp4 scale."""


class Fused(NamedTuple):
    """What `allreduce_rmsnorm` returns; what was not asked for is an empty tensor."""

    norm: Tensor
    residual: Tensor
    quantised: Tensor
    scales: Tensor


def allreduce_rmsnorm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    quant_scale: Tensor | None,
    *,
    group: str,
    eps: float,
    weight_bias: float = 0.0,
    quant: str = "none",
    want_norm: bool = True,
    want_residual: bool = True,
    algorithm: str = "auto",
) -> Fused:
    """The group's own all-reduce, in the input's dtype, then `finish`."""
    check(input, residual, weight, quant_scale, quant)
    reduced = distributed.all_reduce(input, group)
    return finish(
        reduced,
        residual,
        weight,
        quant_scale,
        eps=eps,
        weight_bias=weight_bias,
        quant=quant,
        want_norm=want_norm,
        want_residual=want_residual,
    )


def allreduce_rmsnorm_both(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    group: str,
    eps: float,
    weight_bias: float,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    """`allreduce_rmsnorm` without quantisation: the norm and the sum."""
    fused = allreduce_rmsnorm(
        input, residual, weight, None, group=group, eps=eps, weight_bias=weight_bias
    )
    return fused.norm, fused.residual


def allreduce_rmsnorm_(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    group: str,
    eps: float,
    weight_bias: float = 0.0,
    algorithm: str = "auto",
) -> None:
    """`allreduce_rmsnorm` with the norm written to `input` and the sum to `residual`."""
    fused = allreduce_rmsnorm(
        input,
        residual,
        weight,
        None,
        group=group,
        eps=eps,
        weight_bias=weight_bias,
        want_residual=residual is not None,
    )
    input.copy_(fused.norm)
    if residual is not None:
        residual.copy_(fused.residual)


def all_reduce(input: Tensor, *, group: str, algorithm: str = "auto") -> Tensor:
    """The group's own all-reduce."""
    return distributed.all_reduce(input, group)


def all_reduce_(input: Tensor, *, group: str, algorithm: str = "auto") -> None:
    """`all_reduce` with the sum written to `input`."""
    input.copy_(all_reduce(input, group=group))


def reduce_scatter(input: Tensor, *, group: str) -> Tensor:
    """The group's own reduce-scatter along dimension 0."""
    world = distributed.group_of(group).size()
    if input.dim() == 0 or input.shape[0] % world:
        raise InvalidCollective(
            f"reduce_scatter splits dimension 0 evenly over {world} ranks, and the input's shape "
            f"is {tuple(input.shape)}: pad it to a multiple of {world}"
        )
    return distributed.reduce_scatter(input, group)


def all_gather(input: Tensor, *, group: str) -> Tensor:
    """The group's own all-gather along dimension 0."""
    return distributed.all_gather(input, group)


# --- what follows the sum --------------------------------------------------------------


def finish(
    reduced: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    quant_scale: Tensor | None,
    *,
    eps: float,
    weight_bias: float = 0.0,
    quant: str = "none",
    want_norm: bool = True,
    want_residual: bool = True,
) -> Fused:
    """Residual add, RMSNorm and quantisation of a [..., hidden] sum over the ranks.

    The sum with the residual is made in float32 and rounded to the residual's dtype, or the
    input's without one. The norm is that of the rounded sum, as in a model that adds before it
    normalises; only its mean square is taken before rounding, as vLLM's operator for the CPU does
    it. The norm is rounded to the input's dtype, and quantised after that.
    """
    total = reduced.float()
    if residual is not None:
        total = total + residual.float()
    mean_square = total.square().mean(dim=-1, keepdim=True)
    kept = total.to(reduced.dtype if residual is None else residual.dtype)
    norm = kept.float() * torch.rsqrt(mean_square + eps) * (weight.float() + weight_bias)
    norm = norm.to(reduced.dtype)
    quantised, scales = quantise(norm, quant_scale, quant)
    return Fused(
        norm if want_norm else norm.new_empty(0),
        kept if want_residual else kept.new_empty(0),
        quantised,
        scales,
    )


def quantise(norm: Tensor, quant_scale: Tensor | None, quant: str) -> tuple[Tensor, Tensor]:
    """Quantise a [..., hidden] norm; returns the quantised tensor and its scales.

    - "none": two empty tensors.
    - "fp8_static": norm / quant_scale, clamped, as e4m3 [..., hidden]; no scales. `quant_scale`
      is one float32; the division is a product with its reciprocal in float32.
    - "fp8_token": each row by its own scale, amax / 448, which is in the float32 scales
      [..., 1]; a row of zeros has scale 0 and stays zeros.
    - "nvfp4": blocks of 16 by a scale of their own, e4m3(amax / 6 * quant_scale) in scales
      [..., hidden / 16]; a value is norm * quant_scale / scale rounded to the nearest e2m1, ties
      to even, and two of them lie in a byte of [..., hidden / 2], the first in its low half.
      `quant_scale` is one float32, 448 * 6 over the largest norm there is to be, as FlashInfer
      and vLLM have it.
    """
    if quant == "fp8_static":
        assert quant_scale is not None
        inverse = 1.0 / quant_scale.reshape(())
        return _to_fp8(norm.float() * inverse), norm.new_empty(0, dtype=torch.float32)
    if quant == "fp8_token":
        values = norm.float()
        scales = values.abs().amax(dim=-1, keepdim=True) / FP8_LARGEST
        inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
        return _to_fp8(values * inverse), scales
    if quant == "nvfp4":
        assert quant_scale is not None
        return _to_fp4(norm.float(), quant_scale.reshape(()))
    return norm.new_empty(0, dtype=torch.uint8), norm.new_empty(0, dtype=torch.float32)


def _to_fp8(values: Tensor) -> Tensor:
    return values.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)


def _to_fp4(values: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, hidden = values.shape[:-1], values.shape[-1]
    blocks = values.reshape(*rows, hidden // FP4_BLOCK, FP4_BLOCK)
    largest = blocks.abs().amax(dim=-1)
    scales = _to_fp8(largest * (1.0 / FP4_LARGEST) * global_scale)
    stored = scales.float()
    inverse = torch.where(stored == 0, 0.0, global_scale / stored)
    scaled = (blocks * inverse.unsqueeze(-1)).abs()
    # e2m1 has 0, 0.5, 1, 1.5, 2, 3, 4 and 6; half way between two, the even code wins.
    codes = torch.zeros_like(scaled, dtype=torch.uint8)
    for bound, even_below in FP4_BOUNDS:
        codes += (scaled > bound) if even_below else (scaled >= bound)
    codes |= torch.signbit(blocks).to(torch.uint8) << 3
    low, high = codes.reshape(*rows, hidden // 2, 2).unbind(-1)
    return low | (high << 4), scales


FP4_BOUNDS = (
    (0.25, True),
    (0.75, False),
    (1.25, True),
    (1.75, False),
    (2.5, True),
    (3.5, False),
    (5.0, True),
)
"""The middles between neighbouring e2m1 values, and whether the lower one has the even code."""


# --- arguments -------------------------------------------------------------------------


def check(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    quant_scale: Tensor | None,
    quant: str,
) -> None:
    """Refuse arguments that `allreduce_rmsnorm` has no meaning for.

    Raises:
        InvalidCollective: saying which argument, what it is and what it must be.
    """
    if input.dtype not in DTYPES or input.dim() == 0:
        raise InvalidCollective(
            f"input must be a [..., hidden] tensor of one of {', '.join(map(str, DTYPES))}, got "
            f"{_described(input)}"
        )
    hidden = input.shape[-1]
    if weight.dim() != 1 or weight.shape[0] != hidden:
        raise InvalidCollective(f"weight must be [{hidden}] as the input, got {_described(weight)}")
    if residual is not None and (
        residual.shape != input.shape or residual.dtype not in (input.dtype, torch.float32)
    ):
        raise InvalidCollective(
            f"residual must have the input's shape and its dtype or float32, got "
            f"{_described(residual)} with an input of {_described(input)}"
        )
    if quant not in QUANTS:
        raise InvalidCollective(f"quant must be one of {', '.join(QUANTS)}, got {quant!r}")
    if (quant_scale is not None) != (quant in ("fp8_static", "nvfp4")):
        raise InvalidCollective(
            f"quant_scale goes with fp8_static and nvfp4 and with nothing else, and quant is "
            f"{quant!r} with quant_scale {'missing' if quant_scale is None else 'given'}"
        )
    if quant_scale is not None and (quant_scale.dtype != torch.float32 or quant_scale.numel() != 1):
        raise InvalidCollective(f"quant_scale must be one float32, got {_described(quant_scale)}")
    if quant == "nvfp4" and hidden % FP4_BLOCK:
        raise InvalidCollective(
            f"nvfp4 shares a scale between {FP4_BLOCK} values, and hidden is {hidden}: it must be "
            f"a multiple of {FP4_BLOCK}"
        )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
