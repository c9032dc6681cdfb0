"""One call with random inputs, compared with float64; ranks run it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from splitpoint.collectives import reference
from splitpoint.torch_internals.distributed import group_name

RANDOM_SCALES = (1.0, 1e-3, 30.0)


@dataclass(frozen=True)
class Case:
    """What one call is given; inputs follow from the seed."""

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    residual: str = "same"
    """"none", "same" (the input's dtype) or "wide" (float32)."""
    weight_dtype: torch.dtype = torch.bfloat16
    quant: str = "none"
    algorithm: str = "auto"
    eps: float = 1e-6
    weight_bias: float = 0.0
    want_norm: bool = True
    want_residual: bool = True
    in_place: bool = False
    both: bool = False
    """By the form that returns the norm and the sum."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of all ranks, which each rank knows."""

    inputs: list[Tensor]
    residual: Tensor | None
    weight: Tensor
    quant_scale: Tensor | None


def make(case: Case, ranks: int) -> Inputs:
    rng = torch.Generator().manual_seed(case.seed)
    hidden = case.shape[-1]
    scale = RANDOM_SCALES[case.seed % len(RANDOM_SCALES)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    inputs = [(normal(*case.shape) * scale).to(case.dtype) for _ in range(ranks)]
    residual = None
    if case.residual != "none":
        residual = (normal(*case.shape) * scale).to(
            case.dtype if case.residual == "same" else torch.float32
        )
    weight = (1 + 0.3 * normal(hidden) - case.weight_bias).to(case.weight_dtype)
    quant_scale = None
    if case.quant == "fp8_static":
        quant_scale = torch.tensor(0.01 + float(torch.rand((), generator=rng)) * 0.05)
    if case.quant == "nvfp4":
        quant_scale = torch.tensor(448 * 6 / (3 + 3 * float(torch.rand((), generator=rng))))
    return Inputs(inputs, residual, weight, quant_scale)


def call(case: Case, given: Inputs) -> reference.Fused:
    """The operator on this rank's inputs."""
    ops = torch.ops.splitpoint
    name = group_name(dist.group.WORLD)
    mine = given.inputs[dist.get_rank()].clone()
    residual = None if given.residual is None else given.residual.clone()
    if case.in_place:
        ops.allreduce_rmsnorm_(
            mine,
            residual,
            given.weight,
            group=name,
            eps=case.eps,
            weight_bias=case.weight_bias,
            algorithm=case.algorithm,
        )
        return reference.Fused(
            mine,
            torch.empty(0) if residual is None else residual,
            torch.empty(0, dtype=torch.uint8),
            torch.empty(0),
        )
    if case.both:
        norm, kept = ops.allreduce_rmsnorm(
            mine, residual, given.weight, name, case.eps, case.weight_bias, case.algorithm
        )
        return reference.Fused(norm, kept, torch.empty(0, dtype=torch.uint8), torch.empty(0))
    return reference.Fused(
        *ops.allreduce_rmsnorm(
            mine,
            residual,
            given.weight,
            given.quant_scale,
            group=name,
            eps=case.eps,
            weight_bias=case.weight_bias,
            quant=case.quant,
            want_norm=case.want_norm,
            want_residual=case.want_residual,
            algorithm=case.algorithm,
        )
    )


def check(case: Case, given: Inputs, got: reference.Fused) -> None:
    """Compare with float64; what is quantised must be the quantisation of the norm to the bit."""
    hidden, ranks = case.shape[-1], len(given.inputs)
    parts = [each.double() for each in given.inputs]
    if given.residual is not None:
        parts.append(given.residual.double())
    total = torch.stack(parts).sum(0)
    magnitude = torch.stack(parts).abs().sum(0)
    sum_error = len(parts) * 2.0**-24 * magnitude
    kept = case.dtype if given.residual is None else given.residual.dtype
    # Rounding is monotonic: the rounded sum lies between those of the bounds.
    low, high = ((total + sign * sum_error).float().to(kept).double() for sign in (-1, 1))
    if case.want_residual and not (case.in_place and given.residual is None):
        assert got.residual.dtype == kept
        _between(case, "residual", got.residual, low, high, torch.zeros(()))
    weight = given.weight.double() + case.weight_bias
    rate = torch.rsqrt(total.square().mean(-1, keepdim=True) + case.eps)
    largest = torch.maximum(low.abs(), high.abs()) * rate
    # In one pass over a row of float32, and what may be lost in a subtraction with the bias.
    weight_error = 2.0**-24 * (given.weight.double().abs() + abs(case.weight_bias))
    error = (
        (hidden / 16 + 24) * 2.0**-24 * largest * weight.abs()
        + largest * weight_error
        # An error of the sums moves the rate as well.
        + largest * weight.abs() * (sum_error * total.abs()).mean(-1, keepdim=True) * rate.square()
    )
    ends = torch.stack([low * rate * weight, high * rate * weight])
    lowest, highest = ends.amin(0), ends.amax(0)
    # The norm is rounded once more.
    half_step = torch.finfo(case.dtype).eps / 2
    error = error + half_step * (torch.maximum(lowest.abs(), highest.abs()) + error)
    if case.want_norm:
        assert got.norm.dtype == case.dtype
        _between(case, "norm", got.norm, lowest, highest, error)
        quantised, scales = reference.quantise(got.norm, given.quant_scale, case.quant)
        _same(case, "quantised", got.quantised, quantised)
        _same(case, "scales", got.scales, scales)
    elif case.quant != "none":
        with_norm = Case(**{**case.__dict__, "want_norm": True})
        again = call(with_norm, given)
        _same(case, "quantised", got.quantised, again.quantised)
        _same(case, "scales", got.scales, again.scales)
    if not case.want_norm:
        assert got.norm.shape == (0,)
    if not case.want_residual:
        assert got.residual.shape == (0,)
    assert ranks == dist.get_world_size()


def _between(case: Case, name: str, got: Tensor, low: Tensor, high: Tensor, error: Tensor) -> None:
    assert got.shape == low.shape, (case, name, got.shape)
    value = got.double()
    # Below the smallest normal number, processors may round to zero.
    allowed = 1.01 * error + torch.finfo(got.dtype).smallest_normal * 2
    off = (torch.maximum(low - value, value - high) / allowed).nan_to_num(nan=torch.inf)
    worst = float(off.max()) if off.numel() else 0.0
    assert worst <= 1, f"{case}: {name} is off by {worst} times what rounding explains"


def _same(case: Case, name: str, got: Tensor, expected: Tensor) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (case, name)
    equal = got.view(torch.uint8) == expected.view(torch.uint8) if got.numel() else torch.ones(1)
    assert equal.all(), f"{case}: {int((~equal).sum())} bytes of {name} differ"


def run(cases: list[Case], instruction_set: str = "best", poison: bool = True) -> list[str]:
    """Run and check cases; a digest of each one's results, which all ranks must share."""
    from splitpoint.collectives import shm

    shm.use_instruction_set(instruction_set)
    if poison:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(8).isnan().all()
    digests = []
    try:
        for case in cases:
            given = make(case, dist.get_world_size())
            got = call(case, given)
            check(case, given, got)
            digest = hashlib.sha256()
            for each in got:
                digest.update(each.contiguous().view(torch.uint8).numpy().tobytes())
            digests.append(digest.hexdigest())
    finally:
        torch.use_deterministic_algorithms(False)
        shm.use_instruction_set("best")
    return digests
