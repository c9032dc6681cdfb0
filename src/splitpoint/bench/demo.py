"""`splitpoint demo`: a real model, compiled for ranges, answers, and is then timed for a while."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import Config
from ..errors import (
    BaselineFailed,
    KernelBuildError,
    ModelNotFound,
    OutputMismatch,
    UsageError,
)
from ..integrations import transformers as integration
from ..models.catalogue import DTYPES, SMOLLM2, load
from ..paths import cache_folder
from ..report.environment import environment
from ..tuning.measure import Clock, Timing, clock_for
from .answer import Answer, answer, check_length, prompt_ids
from .check import Expected
from .decoder import prepare
from .demo_report import COMPILED, EAGER, OURS, DemoReport, DemoRow
from .demo_worker import CompiledElsewhere
from .entrants import Say
from .floor import Probes, work_of
from .forward_report import Measured
from .inputs import Forward, last_logits, random_ids

SIZES = (1, 4, 16, 64, 256, 512)
NEW_TOKENS = 96
EAGER_S = 6.0
"""Seconds that eager may answer for: a few tokens are enough for a rate."""

WHOLE_S = 165.0
"""Seconds after which the comparison ends, counted from the start."""
COMPARISON_S = 120.0, 40.0
"""Seconds of the comparison, at most and at least."""
COMPILING_SHARE = 0.6
"""Of the comparison's time, what torch.compile may have until its first result is there."""
REPEATS = 3, 9
"""Calls that are timed, at least and at most."""
SIZE_S = 3.0
"""Seconds that one size is timed for, unless `REPEATS` takes longer."""


def run(
    config: Config, *, dtype: str, threads: int, prompt: str, png: Path, say: Say
) -> DemoReport:
    """Load SmolLM2, compile it, let it answer `prompt`, compare its speed, and draw the curves.

    Prints the answer, the plan and the table; `say` is told what goes on meanwhile.

    Raises:
        ModelNotFound: when the weights are not installed.
        UsageError: when the prompt is too long, or the configuration rounds weights.
        OutputMismatch: when a compiled model's output differs from eager's.
    """
    if config.weights is not None:
        raise UsageError(
            f"the demo compares outputs with the model's own, and weights={config.weights!r} makes "
            f"it another: leave weights out, or use 'splitpoint bench forward'"
        )
    if config.activations is not None:
        raise UsageError(
            f"the demo compares outputs with the model's own, and activations="
            f"{config.activations!r} makes others: leave activations out"
        )
    start = time.perf_counter()
    say(f"loading {SMOLLM2} ({dtype}) ...")
    model, tokenizer = load(SMOLLM2, DTYPES[dtype])
    if tokenizer is None:
        raise ModelNotFound(f"{SMOLLM2} has lost its tokenizer: remove it from {cache_folder()}")
    ids = prompt_ids(tokenizer, prompt)
    check_length(model, SMOLLM2, ids.shape[1], NEW_TOKENS)
    torch.set_num_threads(threads)
    say(f"compiling {len(config.plan().entries)} ranges, or loading them from the store ...")
    say(f"{prepare(model, config)}")
    decoder = integration.decoder_of(model)
    rates = {OURS: rate(answer_aloud(model, tokenizer, prompt, ids))}
    integration.undo(model)
    say(f"the same by transformers alone, for {EAGER_S:.0f} s at most ...")
    rates[EAGER] = rate(answer(model, ids, NEW_TOKENS, max_time_s=EAGER_S))
    ratio = rates[OURS] / rates[EAGER]
    print(
        f"(generate over a paged KV cache: {rates[OURS]:.1f} tokens a second after the first, "
        f"transformers alone {rates[EAGER]:.1f}: {ratio:.1f}x)\n"
    )
    plan = decoder.body.plan
    print(plan, end="\n\n")
    most, least = COMPARISON_S
    seconds = min(most, max(least, WHOLE_S - (time.perf_counter() - start)))
    comparison = Comparison(
        model,
        last_logits(decoder.forward),
        time.perf_counter() + seconds,
        clock_for(threads),
        partial(CompiledElsewhere, SMOLLM2, dtype, threads),
        say,
    )
    say(f"comparing a forward pass, for {seconds:.0f} s at most ...")
    rows = comparison.run([size for size in SIZES if size <= config.max_size])
    facts = {"model": SMOLLM2, "dtype": dtype, "threads": threads, "clock": comparison.clock.name}
    report = DemoReport(
        environment() | facts,
        {name: rates[name] for name in (EAGER, OURS)},
        tuple(rows),
        tuple(comparison.notes),
        plan,
    )
    print(report)
    report.save_picture(png)
    print(f"\nThe picture is {png} ({time.perf_counter() - start:.0f} s in all)")
    return report


def answer_aloud(model: Any, tokenizer: Any, prompt: str, ids: Tensor) -> Answer:
    """Print question and answer, the latter as it comes."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    write(f"\n{prompt}\n> ")
    found = answer(model, ids, NEW_TOKENS, tokenizer=tokenizer, write=write)
    print(flush=True)
    return found


def rate(found: Answer) -> float:
    """Tokens a second after the first; of the first, where it stayed alone."""
    return found.tokens_per_s or 1 / found.first_token_s


# --- the comparison --------------------------------------------------------------------


@dataclass
class Comparison:
    """Eager, torch.compile and splitpoint at some sizes, within a time."""

    model: Any
    ours: Forward
    end: float
    """When it must be over, on `time.perf_counter`."""
    clock: Clock
    start_compiled: Callable[[], CompiledElsewhere]
    """Starts the process with torch.compile's model."""
    say: Say
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    compile_s: float = 0.0
    """Seconds until torch.compile's first result."""

    @property
    def left_s(self) -> float:
        """Seconds until the end."""
        return self.end - time.perf_counter()

    def run(self, sizes: Sequence[int]) -> list[DemoRow]:
        """Check and time one size after the other, from the smallest, while there is time. The
        smallest is always among them."""
        whole = self.left_s
        probes = self._probes()
        rows: list[DemoRow] = []
        with self.start_compiled() as process:
            compiled: CompiledElsewhere | None = process
            spent = 0.0
            for at, size in enumerate(sizes):
                # What a size takes grows with it, once memory is not what it waits for.
                needed = spent * size / sizes[at - 1] if at > 1 else spent
                if rows and needed > self.left_s:
                    rest = ", ".join(map(str, sizes[at:]))
                    self.notes.append(f"Sizes left out, as time was up: {rest}.")
                    break
                if compiled is not None and at < 2:  # a graph for size 1, and one for the others
                    compiled = self._compile(compiled, size, whole)
                start = time.perf_counter()
                row, compiled = self._row(size, compiled, probes)
                rows.append(row)
                spent = time.perf_counter() - start
        return rows

    def _probes(self) -> Probes | None:
        try:
            return Probes(self.model.dtype)
        except KernelBuildError as error:
            self.notes.append(f"There is no floor, as memory cannot be read: {error}.")
            return None

    def _compile(
        self, compiled: CompiledElsewhere, size: int, whole: float
    ) -> CompiledElsewhere | None:
        allowed = min(COMPILING_SHARE * whole, self.left_s)
        if self.compile_s:
            # The second graph takes about as long as the first, and other sizes wait for it.
            allowed = self.left_s - (1 - COMPILING_SHARE) * whole
            if allowed < self.compile_s:
                self.notes.append(
                    f"torch.compile was left out from size {size} on: its graph for other sizes "
                    f"would not have been ready in the time that was left."
                )
                return None
        self.say(f"torch.compile: compiling for size {size}, {allowed:.0f} s at most ...")
        start = time.perf_counter()
        ids = random_ids(self.model.config.vocab_size, size)
        try:
            if compiled.call(ids, allowed) is not None:
                self.compile_s = time.perf_counter() - start
                return compiled
            why = f"it had not compiled after {allowed:.0f} s"
        except BaselineFailed as error:
            why = str(error)
        self.notes.append(f"torch.compile was left out from size {size} on: {why}.")
        return None

    def _row(
        self, size: int, compiled: CompiledElsewhere | None, probes: Probes | None
    ) -> tuple[DemoRow, CompiledElsewhere | None]:
        """One size, and the process with torch.compile's model while it is of use."""
        self.say(f"size {size}: checking and timing ...")
        ids = random_ids(self.model.config.vocab_size, size)
        expected = Expected(self.model, [size])
        expected.check(OURS, self.ours, [size])
        calls: dict[str, Callable[[], float]] = {
            EAGER: partial(self._seconds, partial(last_logits(self.model), ids)),
            OURS: partial(self._seconds, partial(self.ours, ids)),
        }
        if compiled is not None:
            try:
                expected.check(COMPILED, partial(_logits, compiled), [size])
                calls[COMPILED] = partial(_timed, compiled, ids)
            except (BaselineFailed, OutputMismatch) as error:
                self.notes.append(f"torch.compile was left out from size {size} on: {error}.")
                compiled = None
        if probes is not None:
            for name, probe in probes.calls().items():
                calls[name] = partial(self._seconds, probe)
        timings = self._turns(calls)
        floor_ms = None
        if probes is not None:
            work = work_of(self.model, size)
            fastest = min(
                timings[name].best_s for name in (EAGER, COMPILED, OURS) if name in timings
            )
            floor_ms = work.floor_s(probes.rates(timings).raised_by(work, fastest)) * 1e3
        measured = {
            name: Measured(timings[name].median_s * 1e3, timings[name].spread)
            for name in (EAGER, COMPILED, OURS)
            if name in timings
        }
        return DemoRow(size, measured, floor_ms), compiled

    def _seconds(self, call: Callable[[], object]) -> float:
        start = self.clock.read()
        call()
        return self.clock.read() - start

    def _turns(self, calls: dict[str, Callable[[], float]]) -> dict[str, Timing]:
        for call in calls.values():  # warm
            call()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        least, most = REPEATS
        end = min(self.end, time.perf_counter() + SIZE_S)
        for turn in range(most):
            if turn >= least and time.perf_counter() > end:
                break
            names = list(calls)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                samples[name].append(calls[name]())
        return {name: _timing(each) for name, each in samples.items()}


def _logits(compiled: CompiledElsewhere, ids: Tensor) -> Tensor:
    return _called(compiled, ids)[0]


def _timed(compiled: CompiledElsewhere, ids: Tensor) -> float:
    return _called(compiled, ids)[1]


def _called(compiled: CompiledElsewhere, ids: Tensor) -> tuple[Tensor, float]:
    found = compiled.call(ids)
    assert found is not None
    return found


def _timing(samples: list[float]) -> Timing:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    spread = (high - low) / median if median else 0.0
    return Timing(median, min(samples), spread, len(samples), 1)
