"""`splitpoint bench collective`: what ends a tensor-parallel layer, fused and not."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import reference, workspace
from ..errors import OutputMismatch, RankFailed
from ..torch_internals import distributed
from . import vllm_shm

EPS = 1e-6

STANDARD = "Standard AllReduce+RMSNorm"
NATIVE = "Native Compiled"
SHM_COMPILED = "Shm AllReduce, compiled norm"
SHM_KERNEL = "Shm AllReduce, norm kernel"
SHM_TWO_SHOT_KERNEL = "Shm two-shot, norm kernel"
ONE_SHOT = "Fused one-shot"
TWO_SHOT = "Fused two-shot"
VLLM = "vLLM shm AllReduce, its norm"
IN_PLACE = ", in place"

MOVED = "Data movement, fused one-shot"
MOVED_UNFUSED = ("Data movement, unfused", "Data movement, two-shot, unfused")
FLOORS = (MOVED, *MOVED_UNFUSED)
"""What fused and unfused variants move, in place, without the norm's arithmetic."""

UNFUSED = (SHM_COMPILED, SHM_KERNEL, SHM_TWO_SHOT_KERNEL)
FUSED = (ONE_SHOT, TWO_SHOT, ONE_SHOT + IN_PLACE, TWO_SHOT + IN_PLACE)

BASELINES: dict[str, tuple[str, ...]] = {
    "gloo": (STANDARD, NATIVE),
    "compiled": (SHM_COMPILED,),
    "kernel": (SHM_KERNEL, SHM_TWO_SHOT_KERNEL, *FLOORS),
    "vllm": (VLLM,),
}
"""What the fused variants are compared with, by the names that the command line has."""

BURST_S = 300e-6
"""About how long calls follow each other between two meetings of the ranks: so long that the end
of a call does not show as the start of a pause, so short that variants can take many turns."""

FEWEST_CALLS = 4
"""In a burst, so that what a slow collective needs to wake up is not paid by each call."""

MOST_ROUNDS = 400


@dataclass(frozen=True)
class Setting:
    """One configuration that variants are compared in."""

    ranks: int
    hidden: int
    tokens: int
    dtype: torch.dtype
    residual: bool
    quant: str

    @property
    def bytes(self) -> int:
        """Bytes of the input."""
        return self.tokens * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Row:
    """What one variant took in one setting."""

    setting: Setting
    variant: str
    median_s: float
    """Seconds a call: the median over bursts of what the slowest rank took, and over the starts
    of the processes."""
    spread: float
    """Interquartile range over the median."""
    bursts: int
    calls: int
    """Calls in a burst."""
    starts_s: tuple[float, ...] = ()
    """The median of each start of the processes, where there was more than one."""

    @property
    def error(self) -> float:
        """Standard error of the median of one start, relatively, as if bursts were independent
        and normal: 1.2533 sigma / sqrt(bursts), with sigma = interquartile range / 1.349."""
        return 1.2533 / 1.349 * self.spread / math.sqrt(self.bursts)


def over_starts(starts: Sequence[Sequence[Row]]) -> list[Row]:
    """One row for those of the same variant and setting in several starts of the processes."""
    if len(starts) == 1:
        return list(starts[0])
    return [
        replace(
            rows[0],
            median_s=statistics.median(row.median_s for row in rows),
            spread=statistics.median(row.spread for row in rows),
            starts_s=tuple(row.median_s for row in rows),
        )
        for rows in zip(*starts, strict=True)
    ]


Results = tuple[Tensor, ...]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Variant:
    """One way to do it."""

    call: Call
    """Returns the norm (or the quantised norm and its scales) and the sum."""
    restore: Callable[[], None] = lambda: None
    """Puts back what calls overwrite; not timed."""


def measure(
    settings: Sequence[Setting], baselines: Collection[str], budget_s: float, timeout_s: float
) -> list[Row]:
    """On a rank of the default group: verify and time each variant in each setting.

    `baselines` are those of `BASELINES` to compare with; vLLM's are left out where its library is
    not installed. `budget_s` is what each variant is given in each setting, in seconds.

    Raises:
        OutputMismatch: on all ranks, when a variant is wrong on any of them.
        WorkspaceError: when shared memory cannot be used here.
    """
    alone = _alone()
    rows: list[Row] = []
    with (
        workspace.attach(timeout_s=timeout_s) as shared,
        workspace.attach(alone, timeout_s=timeout_s) as own,
        torch.inference_mode(),
    ):
        for setting in settings:
            # One function is compiled anew for each setting, more often than torch expects.
            torch.compiler.reset()
            given = _inputs(setting)
            variants = _variants(setting, given, shared.group, own.group, baselines)
            _verify(setting, given, variants)
            rows += _time(setting, variants, shared.group, budget_s)
    return rows


def _alone() -> dist.ProcessGroup:
    """A group of this rank only: there, the fused operator is a norm kernel."""
    # Every rank takes part in making every group.
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    mine = groups[dist.get_rank()]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


# --- inputs and variants ---------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    all_ranks: list[Tensor]
    residual: Tensor | None
    weight: Tensor
    quant_scale: Tensor | None

    @property
    def mine(self) -> Tensor:
        return self.all_ranks[dist.get_rank()]


def _inputs(setting: Setting) -> _Inputs:
    """The same on all ranks; the norm is about 1 in size, a few times that at most."""
    rng = torch.Generator().manual_seed(setting.hidden * 31 + setting.tokens)
    shape = (setting.tokens, setting.hidden)
    inputs = [torch.randn(shape, generator=rng).to(setting.dtype) for _ in range(setting.ranks)]
    residual = torch.randn(shape, generator=rng).to(setting.dtype) if setting.residual else None
    weight = (1 + 0.1 * torch.randn(setting.hidden, generator=rng)).to(setting.dtype)
    quant_scale = {
        "fp8_static": torch.tensor(8 / reference.FP8_LARGEST),
        "nvfp4": torch.tensor(reference.FP8_LARGEST * reference.FP4_LARGEST / 8),
    }.get(setting.quant)
    return _Inputs(inputs, residual, weight, quant_scale)


def _variants(
    setting: Setting, given: _Inputs, group: str, alone: str, baselines: Collection[str]
) -> dict[str, Variant]:
    wanted = tuple(name for each in baselines for name in BASELINES[each]) + FUSED
    made = _all_variants(setting, given, group, alone, vllm="vllm" in baselines)
    return {
        name: variant for name, variant in made.items() if name.removesuffix(IN_PLACE) in wanted
    }


def _all_variants(
    setting: Setting, given: _Inputs, group: str, alone: str, *, vllm: bool
) -> dict[str, Variant]:
    ops = torch.ops.splitpoint
    fused, fused_ = ops.allreduce_rmsnorm.default, ops.allreduce_rmsnorm_.default
    both, all_reduce = ops.allreduce_rmsnorm.both, ops.all_reduce.default
    x, residual, weight, scale = given.mine, given.residual, given.weight, given.quant_scale
    quant, plain = setting.quant, setting.quant == "none"

    def finish(reduced: Tensor) -> Results:
        return _wanted(
            reference.finish(reduced, residual, weight, scale, eps=EPS, quant=quant), quant
        )

    compiled = torch.compile(finish, dynamic=False)

    def in_group(name: str, algorithm: str, given_x: Callable[[], Tensor]) -> Call:
        if plain:  # as the pass calls it
            return lambda: both(given_x(), residual, weight, name, EPS, 0.0, algorithm)
        return lambda: _wanted(
            reference.Fused(
                *fused(
                    given_x(),
                    residual,
                    weight,
                    scale,
                    group=name,
                    eps=EPS,
                    quant=quant,
                    want_norm=False,
                    algorithm=algorithm,
                )
            ),
            quant,
        )

    def two_shot_reduced() -> Tensor:
        reduced: Tensor = all_reduce(x, group=group, algorithm="two_shot")
        return reduced

    variants = {
        STANDARD: Variant(lambda: finish(distributed.all_reduce(x, group))),
        NATIVE: Variant(lambda: compiled(distributed.all_reduce(x, group))),
        SHM_COMPILED: Variant(lambda: compiled(all_reduce(x, group=group))),
        SHM_KERNEL: Variant(in_group(alone, "one_shot", lambda: all_reduce(x, group=group))),
        SHM_TWO_SHOT_KERNEL: Variant(in_group(alone, "one_shot", two_shot_reduced)),
        ONE_SHOT: Variant(in_group(group, "one_shot", lambda: x)),
        TWO_SHOT: Variant(in_group(group, "two_shot", lambda: x)),
    }
    if not plain:
        return variants
    own_x = x.clone()
    own_residual = None if residual is None else residual.clone()

    def restore() -> None:
        own_x.copy_(x)
        if residual is not None and own_residual is not None:
            own_residual.copy_(residual)

    def results(norm: Tensor) -> Results:
        return (norm,) if own_residual is None else (norm, own_residual)

    def in_place(algorithm: str) -> Call:
        def call() -> Results:
            fused_(own_x, own_residual, weight, group=group, eps=EPS, algorithm=algorithm)
            return results(own_x)

        return call

    def unfused_in_place(algorithm: str) -> Call:
        def call() -> Results:
            reduced = all_reduce(x, group=group, algorithm=algorithm)
            fused_(reduced, own_residual, weight, group=alone, eps=EPS, algorithm="one_shot")
            return results(reduced)

        return call

    def moved() -> Results:
        ops.shm_move_(own_x, own_residual, group)
        return results(own_x)

    def moved_unfused(algorithm: str) -> Call:
        def call() -> Results:
            reduced = all_reduce(x, group=group, algorithm=algorithm)
            ops.shm_move_(reduced, own_residual, alone)
            return results(reduced)

        return call

    variants[MOVED] = Variant(moved, restore)
    for name, algorithm in zip(MOVED_UNFUSED, ("auto", "two_shot"), strict=True):
        variants[name] = Variant(moved_unfused(algorithm), restore)
    variants[SHM_KERNEL + IN_PLACE] = Variant(unfused_in_place("auto"), restore)
    variants[SHM_TWO_SHOT_KERNEL + IN_PLACE] = Variant(unfused_in_place("two_shot"), restore)
    variants[ONE_SHOT + IN_PLACE] = Variant(in_place("one_shot"), restore)
    variants[TWO_SHOT + IN_PLACE] = Variant(in_place("two_shot"), restore)
    if vllm and vllm_shm.unavailable() is None:
        call = vllm_shm.reduce_and_norm(own_x, own_residual, weight, EPS)
        variants[VLLM + IN_PLACE] = Variant(call, restore)
    return variants


def _wanted(fused: reference.Fused, quant: str) -> Results:
    if quant == "none":
        return fused.norm, fused.residual
    return fused.quantised, fused.scales, fused.residual


# --- is it right -----------------------------------------------------------------------


def _verify(setting: Setting, given: _Inputs, variants: Mapping[str, Variant]) -> None:
    """Compare every variant with float64 before any is timed; the ranks vote."""
    total = torch.stack([each.double() for each in given.all_ranks]).sum(0)
    if given.residual is not None:
        total = total + given.residual.double()
    rate = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    norm = total * rate * given.weight.double()
    # The group's own collective rounds to the dtype after each addition, and the norm once more.
    rounding = (setting.ranks + 3) * torch.finfo(setting.dtype).eps
    wrong = []
    for name, variant in variants.items():
        if name in FLOORS:
            continue  # what they leave means nothing
        variant.restore()
        got = variant.call()
        allowed = rounding * (norm.abs() + rate * total.abs().amax()) + 1e-6
        if setting.quant == "none":
            value = got[0].double()
        else:
            value, step = _dequantised(got[0], got[1], given.quant_scale, setting)
            allowed = allowed + step
        bad = not torch.all((value - norm).abs() <= allowed)
        if len(got) > 1 + (setting.quant != "none"):
            kept = got[-1].double()
            bad |= not torch.all((kept - total).abs() <= rounding * total.abs().amax() + 1e-6)
        if bad:
            wrong.append(name)
    votes: list[list[str]] = [wrong] * setting.ranks
    dist.all_gather_object(votes, wrong)
    for rank, names in enumerate(votes):
        if names:
            raise OutputMismatch(
                f"{', '.join(names)}: wrong on rank {rank} at {setting.tokens} x {setting.hidden} "
                f"({setting.dtype}, quant {setting.quant}); nothing was timed"
            )


def _dequantised(
    quantised: Tensor, scales: Tensor, quant_scale: Tensor | None, setting: Setting
) -> tuple[Tensor, Tensor]:
    """What a quantised norm stands for, and how far rounding may have moved it."""
    if setting.quant == "nvfp4":
        assert quant_scale is not None
        codes = torch.stack([quantised & 15, quantised >> 4], -1).flatten(-2).long()
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[codes & 7]
        values = torch.where(codes > 7, -values, values)
        unit = (scales.double() / quant_scale.double()).repeat_interleave(16, -1)
        # Between 4 and 6 the nearest may be 1 away, and a scale may be rounded by 1 in 16.
        return values * unit, unit * (1 + 6 / 16)
    unit = scales.double() if quant_scale is None else quant_scale.double()
    value = quantised.double() * unit
    return value, value.abs() / 16 + unit * 2.0**-9


# --- how long does it take -------------------------------------------------------------


def _time(
    setting: Setting, variants: Mapping[str, Variant], group: str, budget_s: float
) -> list[Row]:
    names = list(variants)
    single = {name: _slowest(_burst(variants[name], 3, group) / 3) for name in names}
    calls = {name: max(FEWEST_CALLS, int(BURST_S / single[name])) for name in names}
    rounds = {
        name: max(5, min(MOST_ROUNDS, int(budget_s / (single[name] * calls[name]))))
        for name in names
    }
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(max(rounds.values())):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            # The slow ones take fewer turns, spread over the whole.
            if turn * rounds[name] // max(rounds.values()) >= len(samples[name]):
                samples[name].append(_burst(variants[name], calls[name], group))
    rows = []
    for name in names:
        slowest = _slowest_of(samples[name])
        low, median, high = statistics.quantiles(slowest, n=4, method="inclusive")
        rows.append(
            Row(
                setting=setting,
                variant=name,
                median_s=median / calls[name],
                spread=(high - low) / median,
                bursts=len(slowest),
                calls=calls[name],
            )
        )
    return rows


def _burst(variant: Variant, calls: int, group: str) -> float:
    """Seconds that a number of calls took on this rank, after the ranks have met."""
    call = variant.call
    variant.restore()
    meeting = torch.zeros(1)
    for _ in range(2):
        torch.ops.splitpoint.all_reduce(meeting, group=group)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _slowest(seconds: float) -> float:
    return _slowest_of([seconds])[0]


def _slowest_of(samples: list[float]) -> list[float]:
    """Element by element, what the slowest rank took."""
    each = torch.tensor(samples, dtype=torch.float64)
    dist.all_reduce(each, dist.ReduceOp.MAX)
    slowest: list[float] = each.tolist()
    return slowest


def same_on_all(answers: Sequence[list[Row]]) -> list[Row]:
    """Rank 0's rows, which all ranks must have come to alike."""
    if any(each != answers[0] for each in answers):
        raise RankFailed("the ranks disagree on what was measured")
    return answers[0]
