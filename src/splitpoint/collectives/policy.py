"""Which algorithm serves how many bytes of all-reduce + RMSNorm: `Policy`, a list of intervals.

What is *admitted* (a backend that is there and takes the shape) comes before what is *measured*
on the machine, and that before the *seed* that public figures give. Bytes are those of one
rank's input, tokens * hidden * itemsize.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
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

    intervals: tuple[Interval, ...]
    """Those that serve a size of the range; neighbours differ in their algorithm, and the last
    one has no end."""
    why: str

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """Those of the range's bytes, ascending; neighbours differ."""
        return tuple(interval.algorithm for interval in self.intervals)

    @property
    def fused(self) -> bool:
        """Whether the graph gets the fused operator. A range over both kinds of graph takes
        that of its largest size."""
        return self.algorithms[-1] in FUSED

    @property
    def algorithm(self) -> str:
        """What the fused operator is to do, as its `algorithm`: "one_shot", or where the bytes
        decide, "one_shot:16384,two_shot" (up to so many bytes, inclusive, and above)."""
        fused = [i for i in self.intervals if i.algorithm in FUSED]
        return spelled((*fused[:-1], Interval(None, fused[-1].algorithm)))


def spelled(intervals: Sequence[Interval]) -> str:
    """Intervals of fused algorithms as the operators take them."""
    parts = [i.algorithm if i.end is None else f"{i.algorithm}:{i.end}" for i in _merged(intervals)]
    return ",".join(parts)


def chosen(text: str, nbytes: int) -> str:
    """The algorithm that a text of `spelled` has for so many bytes; other names as they are."""
    for part in text.split(","):
        name, _, end = part.partition(":")
        if not end or nbytes <= int(end):
            return name
    raise AssertionError(f"{text!r} has no last algorithm")


def _merged(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """With neighbours of one algorithm as one."""
    return tuple(
        interval
        for interval, after in zip(intervals, [*intervals[1:], None], strict=True)
        if after is None or after.algorithm != interval.algorithm
    )


@dataclass(frozen=True)
class Policy:
    """Entries by key. The most specific entry that fits a key decides, measured before seed.

    Numbers of ranks are not interpolated: a key whose device or number of ranks no entry has is
    served by `standard`. There are seeds for 2 to 8 ranks of a CPU, of which those for more than 2
    are derived (their source says so), and for 2, 4 and 8 on NVIDIA, FlashInfer's own numbers.
    """

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
        entry = self.entry(key)
        kept, first, why = [], range_.start, ""
        for interval in entry.intervals if entry else (Interval(None, "standard"),):
            last = range_.end
            if interval.end is not None:
                last = min(last, largest_size(interval.end, key.hidden, itemsize))
            if first <= last:
                algorithm, why = self.choose(key, last * key.hidden * itemsize, admitted)
                kept.append(Interval(interval.end if last < range_.end else None, algorithm))
                first = last + 1
        intervals = _merged(kept)
        if len({i.algorithm in FUSED for i in intervals}) > 1:
            points = self.split_points(key, itemsize, range_.end - 1)
            inside = [str(p) for p in points if range_.start <= p]
            why += f"; a split point at {', '.join(inside)} would serve both kinds of graph"
        return Decision(intervals, why)

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
                end = "any" if interval.end is None else bytes_text(interval.end)
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
    data = json.loads((Path(__file__).parent / "seeds.json").read_text())
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
    if own.hidden is not None:
        # A key of any hidden size is served by an entry for all of them, if there is one.
        hidden = abs(math.log2(own.hidden / key.hidden)) if key.hidden else math.inf
    return (
        entry.origin != "measured",
        own.residual not in (None, key.residual),
        hidden,
        sum(field is None for field in (own.dtype, own.quant, own.residual, own.hidden)),
    )


def bytes_text(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"
