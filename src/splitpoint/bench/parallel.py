"""`splitpoint bench parallel`: a forward pass of a model over tensor-parallel ranks, with
all-reduce + RMSNorm fused and not."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import CompiledModel, Config, compile
from ..collectives import workspace
from ..collectives.launch import run_ranks
from ..collectives.policy import Policy
from ..errors import OutputMismatch, RankFailed
from ..models.catalogue import DTYPES
from ..models.tensor_parallel import TensorParallelLlama, load
from ..passes.allreduce_rmsnorm import AllReduceRMSNorm
from ..passes.base import Pass
from ..passes.shared_memory import SharedMemoryAllReduce
from ..ranges import align
from ..report.environment import environment
from ..runtime import binding
from ..runtime.packed_weights import PackedWeights
from ..torch_internals import distributed

Say = Callable[[str], None]

GLOO, UNFUSED, FUSED = "gloo", "shm unfused", "shm fused"
TIMEOUT_S = 600.0
LEAST_IDS = 100
"""Ids are drawn below this, which every vocabulary has."""
MORE_THAN_ALONE, FLOOR = 3.0, 1e-4
"""How much further from one rank in fp32 logits may be than those of one rank in the same dtype,
and what is allowed in any case; relative to the largest logit. Sums over ranks round elsewhere."""
GLOO_TURNS = 20
"""How often a forward pass by gloo is timed."""


@dataclass(frozen=True)
class Saved:
    """Milliseconds of a forward pass that fusing saves over norms apart, both in shared memory.

    Each start of the ranks gives the median of the differences between neighbouring turns; this is
    the mean over the starts and its standard error. Where things lie in memory differs from start
    to start by more than turns differ.
    """

    ms: float
    error_ms: float
    predicted_ms: float
    """The model's norms times what one saves after an MLP, in the same starts. Weights must be read
    between norms: where nothing else runs, all that a norm apart touches stays in the caches."""
    predicted_error_ms: float

    @classmethod
    def over(cls, starts: Sequence[tuple[float, float]]) -> Saved:
        """Of what each of at least two starts measured and predicted."""
        figures = []
        for each in zip(*starts, strict=True):
            figures += [statistics.mean(each), statistics.stdev(each) / math.sqrt(len(each))]
        return cls(*figures)


@dataclass(frozen=True)
class ParallelReport:
    """Milliseconds of a forward pass by size and by what serves the collectives."""

    environment: dict[str, Any]
    model: str
    ms: dict[int, dict[str, float]]
    """By size and way: the median over starts of the median over calls of the slowest rank."""
    fused: dict[str, int]
    """By range: all-reduces that are fused, equal pieces counted each."""
    starts: int
    """How often the ranks were started."""
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
                "of the differences turn by turn; predicted: what one norm saves in a graph of the",
                f"layers' MLPs with a norm after each, times {self.norms}; both the mean over "
                f"{self.starts} starts",
                "and its standard error. Logits: fused, to one rank in fp32.",
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
    starts: int = 3,
    say: Say = lambda line: None,
) -> ParallelReport:
    """Start the ranks, check the logits of each way against one rank's, and time the ways; that
    `starts` times, at least two.

    Raises:
        OutputMismatch: when logits differ by more than rounding.
        RankFailed, WorkspaceError: as they come up.
    """
    told: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="splitpoint-bench-") as folder:
        kept = replace(settled(config), cache_dir=folder)
        job = (model, dtype, kept.to_json(), policy.to_json(), list(sizes), budget_s, layers)
        for start in range(starts):
            say(f"start {start + 1} of {starts} ...")
            answers = run_ranks(ranks, threads, measure, job)
            if any(answer != answers[0] for answer in answers):
                raise RankFailed("the ranks disagree on what was measured")
            told.append(answers[0])
    ways = told[0].ms[sizes[0]]
    return ParallelReport(
        environment() | {"ranks": ranks, "threads": threads, "dtype": dtype},
        model,
        {
            size: {way: statistics.median(each.ms[size][way] for each in told) for way in ways}
            for size in sizes
        },
        told[0].fused,
        starts,
        told[0].norms,
        {size: Saved.over([each.saved[size] for each in told]) for size in sizes},
        {size: max(each.difference[size] for each in told) for size in sizes},
    )


def settled(config: Config) -> Config:
    """The same with nothing left to measure: what is fused and what is not must not come to differ
    in other kernels. Those named are what decode sizes get by measuring as a rule."""
    ranges = [entry.range for entry in config.plan().entries]
    if config.linear == "auto":
        config = replace(config, linear={f"{r.start}-{r.end}": "packed" for r in ranges})
    if config.attention == "auto":
        config = replace(config, attention={f"{r.start}-{r.end}": "rowwise" for r in ranges})
    return config


@dataclass(frozen=True)
class Measured:
    """What one start of the ranks found, as in `ParallelReport`; the same on every rank."""

    ms: dict[int, dict[str, float]]
    fused: dict[str, int]
    norms: int
    saved: dict[int, tuple[float, float]]
    """By size: milliseconds measured, and predicted."""
    difference: dict[int, float]


def measure(job: tuple[Any, ...]) -> Measured:
    """On a rank."""
    name, dtype, config_text, policy_text, sizes, budget_s, layers = job
    group = dist.group.WORLD
    assert group is not None
    config, policy = Config.from_json(config_text), Policy.from_json(policy_text)
    model, _ = load(name, DTYPES[dtype], group, layers=layers)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_one_copy())
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
        share = norms / len(model.layers)
        ms, saved = {}, {}
        for size in sizes:
            samples = _samples(
                {way: _of(compiled, _inputs(size)) for way, compiled in ways.items()}, budget_s
            )
            ms[size] = {way: 1e3 * statistics.median(each) for way, each in samples.items()}
            given = _chain_inputs(size, model)
            for chain in chains.values():
                chain(*given)
            apart = _samples({way: _of(chain, given) for way, chain in chains.items()}, budget_s)
            saved[size] = _difference(samples), share * _difference(apart)
        return Measured(ms, matched, norms, saved, difference)


@contextmanager
def _one_copy() -> Iterator[None]:
    """What is compiled within reads the same packed weights: of two copies in different places one
    may be faster by more than norms are."""
    weights = PackedWeights()
    with patch.object(binding, "PackedWeights", lambda _: weights):
        yield


class _Chain(nn.Module):
    """MLPs of a model, each with all-reduce, residual and norm after it: [tokens, hidden] twice
    to the same."""

    def __init__(self, model: TensorParallelLlama) -> None:
        super().__init__()
        self.layers = model.layers

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


def _difference(samples: Mapping[str, Sequence[float]]) -> float:
    """Milliseconds that fusing saves: the median over the turns."""
    turns = zip(samples[UNFUSED], samples[FUSED], strict=True)
    return 1e3 * statistics.median(unfused - fused for unfused, fused in turns)


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
        torch.ops.splitpoint.all_reduce(meeting, group=distributed.group_name(group))
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _slowest(samples: list[float]) -> list[float]:
    each = torch.tensor(samples, dtype=torch.float64)
    dist.all_reduce(each, dist.ReduceOp.MAX)
    slowest: list[float] = each.tolist()
    return slowest
