"""`splitpoint bench tuner`: are kernels chosen under load as good as any, and as right?

The model is compiled several times from empty caches while other processes load the machine. Then,
with these gone, every range of each of them takes turns with what else could have been chosen: what
the other runs have, Inductor's own layers, and each kernel at all layers that it fits.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import CompiledModel, Config
from ..errors import LoadFailed, UsageError
from ..passes.linear import VARIANTS
from ..passes.linear_sites import LinearShape
from ..ranges import PlannedRange, Range, align
from ..report.environment import environment
from ..tuning.measure import clock_for, interleave
from . import guard
from .check import Expected
from .entrants import Say, compile_cold
from .forward import start_up
from .inputs import Forward, last_logits, random_ids

INDUCTOR = "inductor"

ALLOWED = 1.03
"""Times the best alternative's time that a range may take."""

DISTURB = Path(__file__).parent / "disturb.py"
"""What loads the machine."""

REPEATS = 15
"""Of each way at each size: medians are to be told apart that are 3 % apart."""

GRACE_S = 1.0
"""Seconds that what loads the machine has for ending by itself."""


@dataclass(frozen=True)
class TunerRow:
    """One range, over all runs."""

    start: int
    end: int
    sizes: tuple[int, ...]
    """At which it was timed: its ends and its hint."""
    choices: tuple[dict[str, str], ...]
    """Of each run, the kernel of each kind of linear layer."""
    ratios: tuple[float, ...]
    """Of each run, its time over that of the best alternative, other runs among them: the mean over
    the sizes of the time relative to the fastest there. Ways with the same kernels in the range are
    one, and have the mean of their times."""
    best: str
    """What was the fastest of all: a way, as it was named first."""
    noise: float
    """How far apart ways with the same kernels were at the most, of their mean: what a ratio may be
    off by."""
    differences: tuple[float, ...]
    """Of each run, how far its logits are from those of the first, as `Expected` measures."""

    @property
    def is_behind(self) -> bool:
        """Whether a run's range is slower than it may be."""
        return max(self.ratios) > ALLOWED


@dataclass(frozen=True)
class TunerReport:
    """A row for each range; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[TunerRow, ...]

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=2)

    def __str__(self) -> str:
        env = self.environment
        runs = range(1, env["runs"] + 1)
        heading = ("range", *(f"run {run}" for run in runs), "best", "noise", "difference")
        cells = [
            (
                str(Range(row.start, row.end)),
                *(f"{ratio:.3f}" for ratio in row.ratios),
                row.best,
                f"{row.noise:.1%}",
                f"{max(row.differences):.2g}",
            )
            for row in self.rows
        ]
        behind = [str(Range(row.start, row.end)) for row in self.rows if row.is_behind]
        worst = max(max(row.differences) for row in self.rows)
        return "\n".join(
            [
                f"{env['model']}, {env['dtype']}, threads: {env['threads']}, {env['clock']}; "
                f"{env['runs']} runs beside {env['load']} loading processes",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *align([heading, *cells], right=range(1, len(runs) + 1)),
                "",
                "run: its time over that of the best alternative, afterwards and without load;",
                "alternatives: other runs' choices, Inductor's layers, each kernel at all layers.",
                "Ways with the same kernels are one; noise: how far apart these were at the most,",
                "which a ratio may be off by.",
                f"More than {ALLOWED - 1:.0%} behind: {', '.join(behind) or 'none'}.",
                f"difference: of a run's logits from the first run's, over their norm; at most "
                f"{worst:.2g}, where {env['limit']:.2g} is allowed.",
                *self._choices(),
            ]
        )

    def _choices(self) -> list[str]:
        """The kinds of layers for which the runs chose otherwise."""
        lines = []
        for row in self.rows:
            for kind in row.choices[0]:
                names = [each.get(kind, INDUCTOR) for each in row.choices]
                if len(set(names)) > 1:
                    where = Range(row.start, row.end)
                    lines.append(f"{where} {kind}: {', '.join(names)}")
        head = "Chosen otherwise from run to run:" if lines else "All runs chose the same."
        return ["", head, *lines]


def run(
    model: Any,
    name: str,
    config: Config,
    *,
    runs: int = 3,
    load: int = 1,
    threads: int = 1,
    budget_s: float = 1.0,
    say: Say = lambda line: None,
) -> TunerReport:
    """Compile `runs` times beside `load` processes that load the machine, and compare what was
    chosen with its alternatives once these have ended. `budget_s` is for each way at each size.

    Raises:
        UsageError: for fewer than two runs, and a configuration whose kernels are not chosen by
            measuring.
        OutputMismatch: when logits are off by more than rounding explains.
        LoadFailed: when what loads the machine ends by itself.
    """
    if runs < 2:
        raise UsageError(f"--runs must be 2 or more, to compare them, got {runs}")
    if config.linear != "auto":
        raise UsageError(f"linear={config.linear!r} leaves nothing to choose: leave it out")
    start_up(threads)
    config = replace(config, cache_dir="")
    hints = sorted({hint for each in config.plan().entries for hint in _sizes(each)})
    expected = Expected(model, hints, config.weights, config.activations)
    ways: dict[str, CompiledModel] = {}
    with loaded(load):
        for index in range(runs):
            way = f"run {index + 1}"
            say(f"{way} of {runs}, beside {load} loading processes: compiling ...")
            ways[way] = compile_cold(model, config, hints)[0]
    mine = list(ways)
    for kernel in alternatives(config, model.dtype):
        say(f"alternative: {kernel} at all layers: compiling ...")
        alone = replace(config, linear={f"1-{config.max_size}": kernel})
        ways[kernel], _ = compile_cold(model, alone, hints)
    forwards = {way: last_logits(compiled) for way, compiled in ways.items()}
    for way, forward in forwards.items():
        expected.check(way, forward)
    rows = []
    for entry in ways[mine[0]].plan.entries:
        say(f"{entry.range}: timing ...")
        rows.append(_row(model, entry, ways, mine, forwards, threads, budget_s))
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    facts = {
        "model": name,
        "dtype": short.get(model.dtype, str(model.dtype)),
        "threads": threads,
        "clock": clock_for(threads).name,
        "runs": runs,
        "load": load,
        "limit": 2 * expected.limit,  # each of two may be off by so much
    }
    return TunerReport(environment() | facts, tuple(rows))


def alternatives(config: Config, dtype: torch.dtype) -> list[str]:
    """The kernels that can be named for all layers, compute what is asked for, and serve some of
    the ranges: none beside the runs themselves where weights are rounded, as a kernel for those
    cannot be named."""
    if config.weights or config.activations or config.batch_invariant:
        return []
    usual = LinearShape((64,), 64, dtype)
    own = [
        name
        for name, each in VARIANTS.items()
        if each.fits(usual)
        and not (each.weights or each.activations or each.batch_invariant)
        and any(each.promises(range_) for range_ in config.plan().ranges)
    ]
    return [INDUCTOR, *own]


@contextmanager
def loaded(count: int) -> Iterator[None]:
    """So many processes load the machine inside, behind `guard`.

    Raises:
        LoadFailed: when one ends by itself.
    """
    files = [guard.__file__, str(DISTURB)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-I", files[0], str(GRACE_S), sys.executable, "-I", files[1], str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which then ends them
        )
        for i in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != b"ready":
                raise LoadFailed(
                    "a process that was to load the machine ended by itself: its output says why"
                )
        yield
    finally:
        for process in processes:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            process.wait()


def _sizes(entry: PlannedRange) -> list[int]:
    return sorted({entry.range.start, entry.hint, entry.range.end})


def _row(
    model: Any,
    entry: PlannedRange,
    ways: Mapping[str, CompiledModel],
    mine: Sequence[str],
    forwards: Mapping[str, Forward],
    threads: int,
    budget_s: float,
) -> TunerRow:
    relative: dict[str, list[float]] = {way: [] for way in ways}
    differences = [0.0 for _ in mine]
    for size in _sizes(entry):
        ids = random_ids(model.config.vocab_size, size)
        logits = [forwards[way](ids) for way in mine]
        differences = [
            max(before, _difference(each, logits[0]))
            for before, each in zip(differences, logits, strict=True)
        ]
        calls = {way: _bound(forward, ids) for way, forward in forwards.items()}
        timings = interleave(calls, clock=clock_for(threads), budget_s=budget_s, repeats=REPEATS)
        fastest = min(each.median_s for each in timings.values())
        for way, timing in timings.items():
            relative[way].append(timing.median_s / fastest)
    planned = {way: compiled.plan.entry_for(entry.hint) for way, compiled in ways.items()}
    means = {way: statistics.fmean(each) for way, each in relative.items()}
    return TunerRow(
        entry.range.start,
        entry.range.end,
        tuple(_sizes(entry)),
        tuple(dict(planned[way].linear) for way in mine),
        *_compared({way: _kernels(each) for way, each in planned.items()}, means, mine),
        tuple(differences),
    )


def _kernels(entry: PlannedRange) -> tuple[tuple[str, str], ...]:
    """What makes one compiled range another."""
    return tuple(sorted([*entry.linear.items(), *entry.attention.items()]))


def _compared(
    kernels: Mapping[str, object], means: Mapping[str, float], mine: Sequence[str]
) -> tuple[tuple[float, ...], str, float]:
    """Ratios, the best and the noise of a `TunerRow`, from the kernels and the relative time of
    each way."""
    same: dict[object, list[str]] = {}
    for way, key in kernels.items():
        same.setdefault(key, []).append(way)
    times = {key: statistics.fmean(means[way] for way in names) for key, names in same.items()}
    apart = [[means[way] / times[key] for way in names] for key, names in same.items()]
    ratios = []
    for way in mine:
        others = [each for key, each in times.items() if key != kernels[way]]
        ratios.append(times[kernels[way]] / min(others) if others else 1.0)
    best = min(times, key=lambda key: times[key])
    return tuple(ratios), same[best][0], max(max(each) - min(each) for each in apart)


def _bound(forward: Forward, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: forward(ids)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())
