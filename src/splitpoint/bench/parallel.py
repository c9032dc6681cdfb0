"""`splitpoint bench parallel`: a forward pass of a model over tensor-parallel ranks, with
all-reduce + RMSNorm fused and not."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import CompiledModel, Config, compile
from ..collectives import workspace
from ..collectives.launch import run_ranks
from ..collectives.policy import Policy
from ..errors import OutputMismatch, RankFailed
from ..models import DTYPES
from ..passes.allreduce_rmsnorm import AllReduceRMSNorm
from ..passes.base import Pass
from ..passes.shared_memory import SharedMemoryAllReduce
from ..ranges import align
from ..tensor_parallel import TensorParallelLlama, load
from .environment import environment

GLOO, UNFUSED, FUSED = "gloo", "shm unfused", "shm fused"
TIMEOUT_S = 600.0
LEAST_IDS = 100
"""Ids are drawn below this, which every vocabulary has."""
MORE_THAN_ALONE, FLOOR = 3.0, 1e-4
"""How much further from one rank in fp32 logits may be than those of one rank in the same dtype,
and what is allowed in any case; relative to the largest logit. Sums over ranks round elsewhere."""


@dataclass(frozen=True)
class ParallelReport:
    """Milliseconds of a forward pass by size and by what serves the collectives."""

    environment: dict[str, Any]
    model: str
    ms: dict[int, dict[str, float]]
    """By size and way: the median over calls of the slowest rank."""
    fused: dict[str, int]
    """By range: all-reduces that are fused, equal pieces counted each."""
    norms: int
    """All-reduces of the model that a norm follows: two a layer."""
    difference: dict[int, float]
    """By size: the largest difference of the fused model's logits to those of one rank in fp32,
    relative to the largest."""

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(self.__dict__, indent=2)

    def __str__(self) -> str:
        heading = ("tokens", *(f"{name} ms" for name in (GLOO, UNFUSED, FUSED)))
        rows = [(*heading, "gloo / fused", "unfused / fused", "us saved a norm", "logits differ")]
        for size, ms in self.ms.items():
            saved = 1e3 * (ms[UNFUSED] - ms[FUSED]) / self.norms
            rows.append(
                (
                    str(size),
                    *(f"{ms[name]:.2f}" for name in (GLOO, UNFUSED, FUSED)),
                    f"{ms[GLOO] / ms[FUSED]:.2f}x",
                    f"{ms[UNFUSED] / ms[FUSED]:.2f}x",
                    f"{saved:.1f}",
                    f"{self.difference[size]:.1e}",
                )
            )
        env = self.environment
        matched = ", ".join(f"{range_} {count}" for range_, count in self.fused.items())
        return "\n".join(
            [
                f"{self.model} over {env['ranks']} ranks of {env['threads']} thread(s), "
                f"{env['dtype']}, on {env['cores']} cores; torch {env['torch']}.",
                f"Fused of {self.norms} all-reduce + norm, by range: {matched}",
                "",
                *align(rows, right=set(range(len(rows[0])))),
                "",
                "Medians of the slowest rank, the three in turns. Unfused: all-reduce in shared",
                "memory, then the norm as Inductor makes it. Logits: fused, to one rank in fp32.",
            ]
        )


def run(
    model: str,
    config: Config,
    policy: Policy,
    *,
    ranks: int,
    dtype: str,
    sizes: Sequence[int],
    threads: int,
    budget_s: float,
    layers: int | None,
) -> ParallelReport:
    """Start the ranks, check the logits of each way against one rank's, and time the ways.

    Raises:
        OutputMismatch: when logits differ by more than rounding.
        RankFailed, WorkspaceError: as they come up.
    """
    answers = run_ranks(
        ranks,
        threads,
        measure,
        (model, dtype, config.to_json(), policy.to_json(), list(sizes), budget_s, layers),
    )
    if any(answer[0] != answers[0][0] for answer in answers):
        raise RankFailed("the ranks disagree on what was measured")
    ms, fused, norms, difference = answers[0]
    known = environment() | {"ranks": ranks, "threads": threads, "dtype": dtype}
    return ParallelReport(known, model, ms, fused, norms, difference)


def measure(job: tuple[Any, ...]) -> tuple[Any, ...]:
    """On a rank: what `ParallelReport` holds."""
    name, dtype, config_text, policy_text, sizes, budget_s, layers = job
    group = dist.group.WORLD
    assert group is not None
    config, policy = Config.from_json(config_text), Policy.from_json(policy_text)
    model, _ = load(name, DTYPES[dtype], group, layers=layers)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # Which all-reduces go where is decided when a graph is compiled.
        gloo = _compiled(model, config, ())
        _first_calls(gloo, sizes)
        stack.enter_context(workspace.attach(group, timeout_s=TIMEOUT_S))
        unfused = _compiled(model, config, (SharedMemoryAllReduce(),))
        fused = _compiled(model, config, (AllReduceRMSNorm(policy), SharedMemoryAllReduce()))
        ways = {GLOO: gloo, UNFUSED: unfused, FUSED: fused}
        for compiled in (unfused, fused):
            _first_calls(compiled, sizes)
        difference = _check(ways, name, dtype, sizes, layers)
        ms = {size: _time(ways, size, budget_s) for size in sizes}
        counts = fused.stats().matched("AllReduceRMSNorm")
        matched = {str(range_): count for range_, count in counts.items()}
        return ms, matched, 2 * len(model.layers), difference


def _compiled(
    model: TensorParallelLlama, config: Config, passes: tuple[Pass, ...]
) -> CompiledModel:
    return compile(model, replace(config, passes=(*config.passes, *passes)))


def _inputs(size: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(LEAST_IDS, (size,), generator=torch.Generator().manual_seed(size))
    return ids, torch.arange(size)


def _first_calls(compiled: CompiledModel, sizes: Sequence[int]) -> None:
    for size in sizes:
        compiled(*_inputs(size))


def _check(
    ways: dict[str, CompiledModel], name: str, dtype: str, sizes: Sequence[int], layers: int | None
) -> dict[int, float]:
    """The fused way's difference to one rank's logits; every way's is checked."""
    exact, alone = (load(name, DTYPES[each], layers=layers)[0] for each in ("fp32", dtype))
    worst = {}
    for size in sizes:
        expected = exact(*_inputs(size))

        def off(logits: Tensor, expected: Tensor = expected) -> float:
            return float((logits.float() - expected).abs().max() / expected.abs().max())

        allowed = MORE_THAN_ALONE * off(alone(*_inputs(size))) + FLOOR
        for way, compiled in ways.items():
            worst[size] = off(compiled(*_inputs(size)))
            if not worst[size] <= allowed:
                raise OutputMismatch(
                    f"{way}: logits of {size} tokens differ from one rank's in fp32 by "
                    f"{worst[size]:.1e} of the largest, more than {allowed:.1e}; nothing was timed"
                )
    return worst


def _time(ways: dict[str, CompiledModel], size: int, budget_s: float) -> dict[str, float]:
    inputs = _inputs(size)
    samples: dict[str, list[float]] = {way: [] for way in ways}
    longest = _slowest([_seconds(ways[GLOO], inputs)])[0]
    rounds = max(5, int(budget_s / longest))
    for turn in range(rounds):
        names = list(ways)
        for way in names[turn % 3 :] + names[: turn % 3]:
            samples[way].append(_seconds(ways[way], inputs))
    return {way: 1e3 * statistics.median(_slowest(each)) for way, each in samples.items()}


def _seconds(call: Callable[..., Any], inputs: tuple[Tensor, Tensor]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call(*inputs)
    return time.perf_counter() - start


def _slowest(samples: list[float]) -> list[float]:
    each = torch.tensor(samples, dtype=torch.float64)
    dist.all_reduce(each, dist.ReduceOp.MAX)
    slowest: list[float] = each.tolist()
    return slowest
