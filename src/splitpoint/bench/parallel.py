"""`splitpoint bench parallel`: a forward pass of a model over tensor-parallel ranks, with
all-reduce + RMSNorm fused and not."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import CompiledModel, Config, _torch_distributed, compile
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
GLOO_TURNS = 20
"""How often a forward pass by gloo is timed."""
CHAIN = 8
"""MLPs with the all-reduce and norm after each in the graph that predictions are made of."""
CHAIN_S = 1.0
"""Seconds that each way of the chain is given at each size."""


@dataclass(frozen=True)
class Saved:
    """Milliseconds of a forward pass that fusing saves over norms apart, both in shared memory."""

    ms: float
    """The median of the differences between neighbouring turns."""
    error_ms: float
    """The standard error of that median."""
    predicted_ms: float
    """The model's norms times what one saves after an MLP, in the same run. Weights must be read
    between norms: where nothing else runs, all that a norm apart touches stays in the caches."""
    predicted_error_ms: float


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
    saved: dict[int, Saved]
    """By size."""
    difference: dict[int, float]
    """By size: the largest difference of the fused model's logits to those of one rank in fp32,
    relative to the largest."""

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        heading = ("tokens", *(f"{name} ms" for name in (GLOO, UNFUSED, FUSED)))
        rows = [
            (
                *heading,
                "gloo / fused",
                "unfused / fused",
                "ms saved",
                "+-",
                "predicted",
                "+-",
                "logits differ",
            )
        ]
        for size, ms in self.ms.items():
            saved = self.saved[size]
            rows.append(
                (
                    str(size),
                    *(f"{ms[name]:.2f}" for name in (GLOO, UNFUSED, FUSED)),
                    f"{ms[GLOO] / ms[FUSED]:.2f}x",
                    f"{ms[UNFUSED] / ms[FUSED]:.3f}x",
                    f"{saved.ms:.3f}",
                    f"{saved.error_ms:.3f}",
                    f"{saved.predicted_ms:.3f}",
                    f"{saved.predicted_error_ms:.3f}",
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
                "memory, then the norm as Inductor makes it. Saved: unfused less fused, the median",
                "of the differences turn by turn, and its standard error. Predicted: what one norm",
                f"saves in a graph of the first layers' MLPs with a norm after each, times "
                f"{self.norms}.",
                "Logits: fused, to one rank in fp32.",
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
    ms, fused, norms, saved, difference = answers[0]
    known = environment() | {"ranks": ranks, "threads": threads, "dtype": dtype}
    return ParallelReport(known, model, ms, fused, norms, saved, difference)


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
        counts = fused.stats().matched("AllReduceRMSNorm")
        matched = {str(range_): count for range_, count in counts.items()}
        norms = 2 * len(model.layers)
        chains = _chains(model, config, policy)
        share = norms / min(CHAIN, len(model.layers))
        ms, saved = {}, {}
        for size in sizes:
            samples = _samples(
                {way: _of(compiled, _inputs(size)) for way, compiled in ways.items()}, budget_s
            )
            ms[size] = {way: 1e3 * statistics.median(each) for way, each in samples.items()}
            given = _chain_inputs(size, model)
            for chain in chains.values():
                chain(*given)
            apart = _samples({way: _of(chain, given) for way, chain in chains.items()}, CHAIN_S)
            predicted, off = (share * each for each in _difference(apart))
            saved[size] = Saved(*_difference(samples), predicted, off)
        return ms, matched, norms, saved, difference


class _Chain(nn.Module):
    """MLPs of a model, each with all-reduce, residual and norm after it: [tokens, hidden] twice
    to the same."""

    def __init__(self, model: TensorParallelLlama) -> None:
        super().__init__()
        self.layers = model.layers[:CHAIN]

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any  # a list of modules does not say of which
        for layer in self.layers:
            gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
            residual = residual + layer.down(F.silu(gate) * up)
            x = layer.before_mlp(residual)
        return x, residual


def _chains(model: TensorParallelLlama, config: Config, policy: Policy) -> dict[str, CompiledModel]:
    """The model without attention, unfused and fused."""
    chain = _Chain(model)
    lazy = replace(config, lazy=True)
    return {
        UNFUSED: _compiled(chain, lazy, (SharedMemoryAllReduce(),)),
        FUSED: _compiled(chain, lazy, (AllReduceRMSNorm(policy), SharedMemoryAllReduce())),
    }


def _chain_inputs(size: int, model: TensorParallelLlama) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    weight = model.norm.weight
    shape = (size, weight.shape[0])
    x, residual = (torch.randn(shape, generator=generator).to(weight.dtype) for _ in range(2))
    return x, residual


def _difference(samples: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """What fusing saves, in milliseconds: the median over the turns, and its standard error."""
    differences = [1e3 * (a - b) for a, b in zip(samples[UNFUSED], samples[FUSED], strict=True)]
    low, median, high = statistics.quantiles(differences, n=4, method="inclusive")
    # Of a median, from the quartiles, as if the differences were normal.
    return median, 1.2533 * (high - low) / 1.349 / math.sqrt(len(differences))


def _compiled(model: nn.Module, config: Config, passes: tuple[Pass, ...]) -> CompiledModel:
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


def _of(call: Callable[..., Any], inputs: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    return lambda: call(*inputs)


def _samples(calls: Mapping[str, Callable[[], Any]], budget_s: float) -> dict[str, list[float]]:
    """Seconds of the slowest rank, turn by turn; what comes first in a turn changes. `budget_s` is
    what each call is given in all. Gloo, which is only there for a ratio, takes a few turns,
    spread over the whole."""
    names = list(calls)
    single = dict(zip(names, _slowest([_seconds(calls[name]) for name in names]), strict=True))
    rounds = max(GLOO_TURNS, int(budget_s / min(single.values())))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            if name != GLOO or turn * GLOO_TURNS // rounds >= len(samples[name]):
                samples[name].append(_seconds(calls[name]))
    return {name: _slowest(each) for name, each in samples.items()}


def _seconds(call: Callable[[], Any]) -> float:
    meeting, group = torch.zeros(1), dist.group.WORLD
    assert group is not None
    for _ in range(2):
        # By gloo the ranks would leave one after the other.
        torch.ops.splitpoint.all_reduce(meeting, group=_torch_distributed.group_name(group))
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _slowest(samples: list[float]) -> list[float]:
    each = torch.tensor(samples, dtype=torch.float64)
    dist.all_reduce(each, dist.ReduceOp.MAX)
    slowest: list[float] = each.tolist()
    return slowest
