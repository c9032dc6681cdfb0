"""Honest timing: several callables in one run, taking turns, medians over repeats."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

MIN_REPEATS = 3
"""Fewer repeats than this give no spread, whatever the budget."""

MAX_CALLS = 1 << 20
"""Most calls a repeat makes; only reached by what takes well under a microsecond."""


@dataclass(frozen=True)
class Clock:
    """A source of seconds and what it counts."""

    name: str
    read: Callable[[], float]


THREAD_CPU_TIME = Clock("CPU time of the calling thread", time.thread_time)
WALL_TIME = Clock("wall time", time.perf_counter)


def clock_for(threads: int) -> Clock:
    """The clock for work that uses `threads` threads.

    One thread: its own CPU time, which other processes on the machine hardly disturb.
    More: wall time, because the calling thread's CPU time would miss the others' work.
    """
    return THREAD_CPU_TIME if threads == 1 else WALL_TIME


@dataclass
class Budget:
    """Seconds of the calling thread's CPU time for all that is measured, which a busy machine does
    not use up."""

    seconds: float = 10.0
    spent_s: float = 0.0

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may be measured."""
        return self.spent_s >= self.seconds

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count what is done inside."""
        start = THREAD_CPU_TIME.read()
        try:
            yield
        finally:
            self.spent_s += THREAD_CPU_TIME.read() - start


@dataclass(frozen=True)
class Timing:
    """What one callable took, in seconds per call."""

    median_s: float
    best_s: float
    spread: float
    """Interquartile range over the median: 0.05 means that the middle half of the repeats
    lies within 5 %."""
    repeats: int
    calls: int
    """Calls in a repeat; a repeat's time is divided by it."""


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    clock: Clock,
    budget_s: float = 1.0,
    repeats: int = 9,
    warm_up: int = 2,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time callables against each other, in turns, so that drift meets all of them alike.

    Each callable is warmed up `warm_up` times, then timed in `repeats` rounds. A round times
    every callable once, each round starting with the next one; within it a callable is called
    as often as its share of `budget_s` (seconds on `clock`, for each callable) allows. A callable
    for which even one call a round is over the budget takes part in fewer of them, evenly spread,
    but never under `MIN_REPEATS`. The garbage collector is off while a round runs. `before` is
    called before each callable's part in a round, and is not timed.

    Raises:
        ValueError: for no callables, or a budget, repeats or warm-up out of range.
    """
    if not callables or budget_s <= 0 or repeats < MIN_REPEATS or warm_up < 0:
        raise ValueError(
            f"need at least one callable, budget_s > 0, repeats >= {MIN_REPEATS} and "
            f"warm_up >= 0; got {len(callables)}, {budget_s}, {repeats}, {warm_up}"
        )
    names = list(callables)
    for call in callables.values():
        for _ in range(warm_up):
            call()
    seconds = {name: _estimate(callables[name], clock, budget_s / repeats) for name in names}
    share = {n: max(MIN_REPEATS, min(repeats, int(budget_s / seconds[n]))) for n in names}
    rounds = max(share.values())
    calls = {n: max(1, min(MAX_CALLS, int(budget_s / share[n] / seconds[n]))) for n in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if _takes_part(turn, share[name], rounds):
                if before is not None:
                    before()
                samples[name].append(_timed(callables[name], calls[name], clock) / calls[name])
    return {name: _summary(samples[name], calls[name]) for name in names}


def _takes_part(turn: int, share: int, rounds: int) -> bool:
    """Whether a turn is among `share` of `rounds` that are spread evenly around the middle."""
    before, after = ((share * t + rounds // 2) // rounds for t in (turn, turn + 1))
    return after > before


def _estimate(call: Callable[[], object], clock: Clock, enough_s: float) -> float:
    """Seconds per call, from as many calls as it takes for the clock to tell."""
    calls = 1
    while True:
        elapsed = _timed(call, calls, clock)
        if elapsed >= enough_s / 10 or calls >= MAX_CALLS:
            # A clock that did not move at all means "as fast as can be", not "never".
            return max(elapsed, 1e-12) / calls
        calls *= 4


def _timed(call: Callable[[], object], calls: int, clock: Clock) -> float:
    with _no_gc():
        start = clock.read()
        for _ in range(calls):
            call()
        return clock.read() - start


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _summary(samples: list[float], calls: int) -> Timing:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(
        median_s=median,
        best_s=min(samples),
        spread=(high - low) / median if median else 0.0,
        repeats=len(samples),
        calls=calls,
    )
