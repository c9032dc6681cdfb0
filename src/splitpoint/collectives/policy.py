"""Which algorithm serves how many bytes of all-reduce + RMSNorm: `Policy`, a list of intervals.

What is *admitted* (a backend that is there and takes the shape) comes before what is *measured*
on the machine, and that before the *seed* that public figures give. Bytes are those of one
rank's input, tokens * hidden * itemsize.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args

from ..errors import InvalidPolicy
from ..ranges import Range, align

Algorithm = Literal["standard", "native", "one_shot", "two_shot"]
"""`standard`: all-reduce, then norm (and quantisation), each a kernel of its own. `native`:
all-reduce, then norm as the compiler makes it. `one_shot`, `two_shot`: one fused kernel, in
which each rank reads all of every input, or reduces its own part and shares the result."""
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
FUSED: frozenset[Algorithm] = frozenset({"one_shot", "two_shot"})
"""Those that need the fused operator in the graph; the others leave the graph as it is."""

Quant = Literal["none", "fp8_static", "fp8_token", "nvfp4"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
Origin = Literal["measured", "seed"]


@dataclass(frozen=True)
class Key:
    """What a choice depends on besides bytes; None stands for any value, in an entry only."""

    device: str
    """"cpu", or a compute capability such as "sm90"."""
    world_size: int
    dtype: str | None = None
    """Of the input, such as "bfloat16"."""
    residual: bool | None = None
    """Whether a residual is added."""
    quant: Quant | None = None
    hidden: int | None = None

    def __str__(self) -> str:
        parts = [self.device, f"{self.world_size} ranks"]
        parts += [self.dtype] if self.dtype else []
        parts += [] if self.residual is None else ["residual" if self.residual else "no residual"]
        parts += [self.quant] if self.quant not in (None, "none") else []
        parts += [f"hidden {self.hidden}"] if self.hidden else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Interval:
    """The bytes up to `end` (inclusive, None: without end) that the interval before leaves."""

    end: int | None
    algorithm: Algorithm


@dataclass(frozen=True)
class Entry:
    """The intervals of one key, over all bytes from 0 on."""

    key: Key
    intervals: tuple[Interval, ...]
    origin: Origin
    source: str
    """Where the intervals come from, for people."""

    def __post_init__(self) -> None:
        ends = [interval.end for interval in self.intervals]
        bounded = [end for end in ends if end is not None]
        if not ends or ends[-1] is not None or len(bounded) != len(ends) - 1:
            raise InvalidPolicy(f"{self.key}: the last interval, and only it, must have end null")
        if any(a >= b for a, b in pairwise([-1, *bounded])):
            raise InvalidPolicy(f"{self.key}: the ends of intervals must ascend, got {bounded}")
        for interval in self.intervals:
            if interval.algorithm not in ALGORITHMS:
                raise InvalidPolicy(
                    f"{self.key}: algorithm must be one of {', '.join(ALGORITHMS)}, "
                    f"got {interval.algorithm!r}"
                )

    def algorithm(self, nbytes: int) -> Algorithm:
        """The algorithm that serves so many bytes."""
        return next(i.algorithm for i in self.intervals if i.end is None or nbytes <= i.end)


@dataclass(frozen=True)
class Decision:
    """What serves a range of sizes, and why."""

    algorithms: tuple[Algorithm, ...]
    """Those of the range's bytes, ascending; neighbours differ."""
    why: str

    @property
    def fused(self) -> bool:
        """Whether the graph gets the fused operator. A range over both kinds of graph takes
        that of its largest size."""
        return self.algorithms[-1] in FUSED

    @property
    def algorithm(self) -> str:
        """The operator's `algorithm`: "auto" where both fused ones occur."""
        fused = {a for a in self.algorithms if a in FUSED}
        return next(iter(fused)) if len(fused) == 1 else "auto"


@dataclass(frozen=True)
class Policy:
    """Entries by key. The most specific entry that fits a key decides, measured before seed."""

    entries: tuple[Entry, ...] = ()

    def entry(self, key: Key) -> Entry | None:
        """The entry that decides for a key, None when none is near enough.

        Device, ranks, dtype and quantisation must fit. Where they do and the hidden size or
        the residual was not measured, the nearest one that was is taken.
        """
        fitting = [(d, entry) for entry in self.entries if (d := _distance(entry, key)) is not None]
        return min(fitting, key=lambda pair: pair[0])[1] if fitting else None

    def choose(
        self, key: Key, nbytes: int, admitted: Collection[str] = ALGORITHMS
    ) -> tuple[Algorithm, str]:
        """The algorithm for so many bytes, and why. What is not admitted gives way to the other
        fused one, then to `standard`."""
        entry = self.entry(key)
        if entry is None:
            return "standard", f"nothing is known of {key}"
        wanted = entry.algorithm(nbytes)
        why = f"{entry.origin} for {entry.key}"
        if wanted in admitted:
            return wanted, why
        order = sorted(FUSED, key=lambda a: a != wanted) if wanted in FUSED else []
        given: Algorithm = next((a for a in order if a in admitted), "standard")
        return given, f"{why}, where {wanted} is not admitted"

    def decide(
        self, key: Key, itemsize: int, range_: Range, admitted: Collection[str] = ALGORITHMS
    ) -> Decision:
        """What serves a range of sizes of a known hidden size."""
        assert key.hidden is not None
        row = key.hidden * itemsize
        ends = [range_.start * row, range_.end * row]
        entry = self.entry(key)
        for interval in entry.intervals if entry else ():
            if interval.end is not None and ends[0] <= interval.end < range_.end * row:
                size = largest_size(interval.end, key.hidden, itemsize)
                ends += [s * row for s in (size, size + 1) if s in range_]
        found = [self.choose(key, nbytes, admitted) for nbytes in sorted(set(ends))]
        algorithms = [algorithm for algorithm, _ in found]
        distinct = [a for i, a in enumerate(algorithms) if i == 0 or algorithms[i - 1] != a]
        why = found[-1][1]
        if len({a in FUSED for a in distinct}) > 1:
            points = self.split_points(key, itemsize, range_.end - 1)
            inside = [str(p) for p in points if range_.start <= p]
            why += f"; a split point at {', '.join(inside)} would serve both kinds of graph"
        return Decision(tuple(distinct), why)

    def split_points(self, key: Key, itemsize: int, max_size: int) -> tuple[int, ...]:
        """The sizes at which the graph must change: the last size of each run of intervals that
        share a graph. Where only the algorithm differs the operator chooses, and no range is
        spent."""
        assert key.hidden is not None
        entry = self.entry(key)
        points = []
        for before, after in pairwise(entry.intervals if entry else ()):
            if (before.algorithm in FUSED) != (after.algorithm in FUSED):
                assert before.end is not None
                points.append(largest_size(before.end, key.hidden, itemsize))
        return tuple(sorted({point for point in points if 1 <= point <= max_size}))

    def over(self, other: Policy) -> Policy:
        """These entries, and the other's for keys that these do not have."""
        own = {(entry.key, entry.origin) for entry in self.entries}
        rest = [entry for entry in other.entries if (entry.key, entry.origin) not in own]
        return Policy((*self.entries, *rest))

    # --- reading and writing -----------------------------------------------------------

    def to_json(self) -> str:
        """The policy as JSON text; `from_json` gives an equal one back."""
        rows = [
            {
                "key": {k: v for k, v in asdict(entry.key).items() if v is not None},
                "intervals": [[i.end, i.algorithm] for i in entry.intervals],
                "origin": entry.origin,
                "source": entry.source,
            }
            for entry in self.entries
        ]
        return "\n".join(['{"entries": [', ",\n".join(map(json.dumps, rows)), "]}"])

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Read a policy written by `to_json`.

        Raises:
            InvalidPolicy: when the text is none, or its intervals are not in order.
        """
        try:
            rows = json.loads(text)["entries"]
            return cls(tuple(_entry(row, row["origin"], row["source"]) for row in rows))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InvalidPolicy):
                raise
            raise InvalidPolicy(f"this is not the JSON of a policy: {error!r}") from error

    def __str__(self) -> str:
        rows = [("configuration", "up to", "algorithm", "origin")]
        for entry in self.entries:
            label, origin = str(entry.key), str(entry.origin)
            for interval in entry.intervals:
                end = "any" if interval.end is None else _bytes(interval.end)
                rows.append((label, end, interval.algorithm, origin))
                label = origin = ""
        return "\n".join(align(rows, right={1}))


def largest_size(nbytes: int, hidden: int, itemsize: int) -> int:
    """The most tokens whose input takes at most so many bytes. The one place where bytes become
    sizes."""
    return nbytes // (hidden * itemsize)


@cache
def seed_policy() -> Policy:
    """The choices that public figures give before anything is measured (`seeds.json`)."""
    data = json.loads(importlib.resources.files(__package__).joinpath("seeds.json").read_text())
    return Policy(
        tuple(_entry(row, "seed", data["sources"][row["source"]]) for row in data["entries"])
    )


def _entry(row: dict[str, Any], origin: Origin, source: str) -> Entry:
    if origin not in get_args(Origin):
        raise InvalidPolicy(f"origin must be 'measured' or 'seed', got {origin!r}")
    intervals = tuple(Interval(end, algorithm) for end, algorithm in row["intervals"])
    return Entry(Key(**row["key"]), intervals, origin, source)


def _distance(entry: Entry, key: Key) -> tuple[float, ...] | None:
    """How far an entry is from a key, nearest first; None when it does not fit."""
    own = entry.key
    if (own.device, own.world_size) != (key.device, key.world_size):
        return None
    exact = [(own.dtype, key.dtype), (own.quant, key.quant)]
    if any(a not in (None, b) for a, b in exact):
        return None
    hidden = 0.0
    if own.hidden is not None and key.hidden is not None:
        hidden = abs(math.log2(own.hidden / key.hidden))
    return (
        entry.origin != "measured",
        own.residual not in (None, key.residual),
        hidden,
        sum(field is None for field in (own.dtype, own.quant, own.residual, own.hidden)),
    )


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


# --- from measurements -----------------------------------------------------------------

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
            f"{self.key} at {_bytes(self.nbytes)}: {wants}. One choice for all is at best "
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
