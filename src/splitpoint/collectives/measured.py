"""From measured times to a `Policy`: the fewest intervals that give each its fastest algorithm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..errors import InvalidPolicy
from .policy import ALGORITHMS, Algorithm, Entry, Interval, Key, Policy, bytes_text

TIE = 0.03
"""Times this near to the fastest, relatively, count as equal to it."""


@dataclass(frozen=True)
class Measurement:
    """The time of each algorithm for one key (with its hidden size) and number of bytes."""

    key: Key
    nbytes: int
    seconds: tuple[tuple[Algorithm, float], ...]
    """In the order of `ALGORITHMS`, those that were measured."""

    def __post_init__(self) -> None:
        bad = [t for _, t in self.seconds if not (math.isfinite(t) and t > 0)]
        if not self.seconds or bad:
            raise InvalidPolicy(f"{self.key}, {self.nbytes} bytes: times must be positive: {bad}")

    def slowdown(self, algorithm: Algorithm) -> float:
        """Its time over the fastest's; infinite if not measured."""
        times = dict(self.seconds)
        return times.get(algorithm, math.inf) / min(times.values())

    def fastest(self, tie: float = TIE) -> frozenset[Algorithm]:
        """The fastest algorithms."""
        return frozenset(a for a, _ in self.seconds if self.slowdown(a) <= 1 + tie)


@dataclass(frozen=True)
class Contradiction:
    """Bytes at which no algorithm is fastest for all hidden sizes."""

    key: Key
    """Without hidden size."""
    nbytes: int
    fastest: tuple[tuple[int, tuple[Algorithm, ...]], ...]
    """By hidden size."""
    best_common: Algorithm
    slowdown: float
    """The worst that the best common choice does, over the fastest; a choice by hidden size
    too has 1."""

    def __str__(self) -> str:
        wants = "; ".join(f"hidden {h}: {' or '.join(names)}" for h, names in self.fastest)
        return (
            f"{self.key} at {bytes_text(self.nbytes)}: {wants}. One choice for all is at best "
            f"{self.best_common}, up to {100 * (self.slowdown - 1):.0f} % slower than by hidden "
            f"size"
        )


def contradictions(rows: Iterable[Measurement], tie: float = TIE) -> list[Contradiction]:
    """Where one byte threshold for all hidden sizes contradicts what was measured."""
    found = []
    for key, group in _by_key(rows, by_hidden=False).items():
        for nbytes, same in _by_bytes(group).items():
            if not frozenset.intersection(*(row.fastest(tie) for row in same)):
                costs = {a: max(row.slowdown(a) for row in same) for a in ALGORITHMS}
                best = min(ALGORITHMS, key=lambda a: costs[a])
                fastest = tuple(
                    (row.key.hidden or 0, tuple(a for a in ALGORITHMS if a in row.fastest(tie)))
                    for row in sorted(same, key=lambda row: row.key.hidden or 0)
                )
                found.append(Contradiction(key, nbytes, fastest, best, costs[best]))
    return found


def build(rows: Iterable[Measurement], source: str, tie: float = TIE) -> Policy:
    """The policy that gives each measurement its fastest algorithm (ties count as either), in
    the fewest intervals. An entry is for all hidden sizes where that contradicts none of them
    and needs no more intervals than the hidden sizes apart do.

    Between two measured points the cut is where the lines between their times cross, over the
    logarithm of bytes.

    Raises:
        InvalidPolicy: for two measurements of one configuration.
    """
    rows = list(rows)
    entries = []
    for key, group in _by_key(rows, by_hidden=False).items():
        apart = {k: _intervals(part, tie) for k, part in _by_key(group, by_hidden=True).items()}
        common = _intervals(group, tie)
        most = max(len(intervals or ()) for intervals in apart.values())
        if len(apart) > 1 and common is not None and len(common) <= most:
            apart = {key: common}
        for own, intervals in apart.items():
            assert intervals is not None
            entries.append(Entry(own, intervals, "measured", source))
    return Policy(tuple(entries))


def _by_key(rows: Iterable[Measurement], *, by_hidden: bool) -> dict[Key, list[Measurement]]:
    groups: dict[Key, list[Measurement]] = {}
    for row in rows:
        key = row.key if by_hidden else replace(row.key, hidden=None)
        groups.setdefault(key, []).append(row)
    if by_hidden:
        for key, group in groups.items():
            if len({row.nbytes for row in group}) < len(group):
                raise InvalidPolicy(f"{key}: one number of bytes was measured twice")
    return groups


def _by_bytes(rows: Iterable[Measurement]) -> dict[int, list[Measurement]]:
    groups: dict[int, list[Measurement]] = {}
    for row in sorted(rows, key=lambda row: row.nbytes):
        groups.setdefault(row.nbytes, []).append(row)
    return groups


def _intervals(rows: Sequence[Measurement], tie: float) -> tuple[Interval, ...] | None:
    """The fewest intervals that give each row one of its fastest, and among those the ones with
    the least time; None when rows of equal bytes have none in common."""
    points = list(_by_bytes(rows).values())
    # best[a]: (changes, summed slowdown, path) of the cheapest choices that end in a.
    best: dict[Algorithm, tuple[int, float, tuple[Algorithm, ...]]] = {}
    for index, same in enumerate(points):
        step: dict[Algorithm, tuple[int, float, tuple[Algorithm, ...]]] = {}
        allowed = frozenset.intersection(*(row.fastest(tie) for row in same))
        for a in (a for a in ALGORITHMS if a in allowed):
            cost = sum(row.slowdown(a) for row in same)
            if index == 0:
                step[a] = (0, cost, (a,))
            else:
                step[a] = min(
                    (changes + (b != a), spent + cost, (*path, a))
                    for b, (changes, spent, path) in best.items()
                )
        if not step:
            return None
        best = step
    path = min(best.values())[2]
    intervals = []
    for index, (a, b) in enumerate(pairwise(path)):
        if a != b:
            cut = _crossing(points[index], points[index + 1], a, b)
            intervals.append(Interval(cut, a))
    return (*intervals, Interval(None, path[-1]))


def _crossing(
    before: Sequence[Measurement], after: Sequence[Measurement], a: Algorithm, b: Algorithm
) -> int:
    """The bytes from `before`'s to just under `after`'s at which b becomes faster than a."""

    def lead(rows: Sequence[Measurement]) -> float:
        """How much slower b is than a, relative to the fastest; the mean over the rows."""
        return sum(row.slowdown(b) - row.slowdown(a) for row in rows) / len(rows)

    first, last = before[0].nbytes, after[0].nbytes
    ahead, behind = lead(before), lead(after)
    share = 0.5
    if math.isfinite(ahead) and math.isfinite(behind) and ahead > behind:
        share = min(max(ahead / (ahead - behind), 0.0), 1.0)
    cut: int = round(first * (last / first) ** share)
    return min(max(cut, first), last - 1)
