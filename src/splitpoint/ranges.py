"""`Range`, `Plan` and the table that finds a size's range in one look-up."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, total_ordering
from typing import TYPE_CHECKING, Any

from .errors import InvalidJSON, InvalidRange, SizeOutOfPlan

if TYPE_CHECKING:
    from .config import Config

NOT_SERVED = 0
"""The table entry of a size that no range serves; entry i + 1 is the i-th range."""


@total_ordering
@dataclass(frozen=True)
class Range:
    """The sizes from `start` to `end`, both included.

    Ranges order by `(end, start)`, so that a single size stands before the wider range
    around it.

    Raises:
        InvalidRange: unless `1 <= start <= end`.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidRange(f"Range {name} must be an integer, got {value!r}")
        if self.start < 1:
            raise InvalidRange(
                f"Range start must be at least 1, got {self.start}: size 0 needs no graph"
            )
        if self.end < self.start:
            raise InvalidRange(
                f"Range [{self.start},{self.end}] is empty: the end (inclusive) must not be "
                f"below the start"
            )

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read `"9-32"`, `"[9,32]"` or `"16"` (a single size).

        Raises:
            InvalidRange: when the text is none of these.
        """
        parts = text.strip().removeprefix("[").removesuffix("]").replace(",", "-").split("-")
        if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
            raise InvalidRange(f"cannot read {text!r} as a range: write '9-32', or '16'")
        return cls(int(parts[0]), int(parts[-1]))

    @property
    def is_single_size(self) -> bool:
        """Whether the range holds exactly one size, which makes its graphs fully static."""
        return self.start == self.end

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.start <= size <= self.end

    def __len__(self) -> int:
        return self.end - self.start + 1

    def __lt__(self, other: Range) -> bool:
        return (self.end, self.start) < (other.end, other.start)

    def __str__(self) -> str:
        return f"[{self.start},{self.end}]"


@dataclass(frozen=True)
class PlannedRange:
    """One line of a plan: a range and what it was given."""

    range: Range
    hint: int
    """The size the compiler tunes for; inside the range."""
    passes: tuple[str, ...] = ()
    """Names of the passes that run for this range."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Inductor options of this range."""
    linear: Mapping[str, str] = field(default_factory=dict)
    """Kernel of each shape of linear layer ("576->1536"), for those that are not Inductor's."""
    only: tuple[tuple[int, int], ...] = ()
    """The runs (first, last) of sizes that are served, where the range serves only some of
    its sizes (those that a model's own condition leaves it); () means all of them."""
    note: str = ""
    """Why the range is there, when it does not come from the configuration."""
    collectives: tuple[str, ...] = ()
    """What each kind of all-reduce + norm was given, and why; known after compiling."""
    attention: Mapping[str, str] = field(default_factory=dict)
    """Kernel of each shape of attention, for those that are not torch's own."""


@dataclass(frozen=True)
class Plan:
    """The ordered ranges over [1, max_size], with what each was given. Pure data.

    A single size wins over the range around it. `print(plan)` shows a table.
    """

    max_size: int
    entries: tuple[PlannedRange, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Config) -> Plan:
        """The plan a configuration asks for, before any model has been seen."""
        starts = [1, *(point + 1 for point in config.split_points)]
        ends = [*config.split_points, config.max_size]
        singles = {Range(size, size) for size in config.compile_sizes}
        notes = []
        ranges = set(singles)
        for start, end in zip(starts, ends, strict=True):
            if start > end:  # the last split point is max_size itself
                continue
            wide = Range(start, end)
            if wide not in singles and all(
                Range(size, size) in singles for size in range(start, end + 1)
            ):
                notes.append(f"{wide} gets no graph of its own: compile_sizes has all its sizes")
                continue
            ranges.add(wide)
        return cls(
            config.max_size,
            tuple(config.planned(range_) for range_ in sorted(ranges)),
            tuple(notes),
        )

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The ranges in order."""
        return tuple(entry.range for entry in self.entries)

    @cached_property
    def table(self) -> array[int]:
        """`table[size]` is 1 + the index in `entries` of the size's range, or `NOT_SERVED`.

        Holds max_size + 1 entries of 2 bytes.
        """
        table = array("H", bytes(2 * (self.max_size + 1)))
        # Wide first, so that what is narrower (a single size, the part of a range with a
        # condition) is written over it.
        for index in sorted(range(len(self.entries)), key=lambda i: -len(self.entries[i].range)):
            entry = self.entries[index]
            for start, end in entry.only or ((entry.range.start, entry.range.end),):
                table[start : end + 1] = array("H", [index + 1]) * (end - start + 1)
        return table

    def entry_for(self, size: int) -> PlannedRange:
        """The line of the plan that serves a size, in constant time.

        Raises:
            SizeOutOfPlan: for a size outside [1, max_size] or one that no range serves.
        """
        if not 1 <= size <= self.max_size:
            raise SizeOutOfPlan(f"size {size} is outside the plan's [1,{self.max_size}]")
        index = self.table[size]
        if index == NOT_SERVED:
            raise SizeOutOfPlan(f"size {size} is served by no range of the plan")
        return self.entries[index - 1]

    def range_for(self, size: int) -> Range:
        """The range that serves a size, in constant time.

        Raises:
            SizeOutOfPlan: for a size outside [1, max_size] or one that no range serves.
        """
        return self.entry_for(size).range

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives an equal plan back."""
        return json.dumps(
            {
                "max_size": self.max_size,
                "ranges": [
                    {
                        "start": entry.range.start,
                        "end": entry.range.end,
                        "hint": entry.hint,
                        "passes": list(entry.passes),
                        "options": dict(entry.options),
                        "linear": dict(entry.linear),
                        "attention": dict(entry.attention),
                        "collectives": list(entry.collectives),
                        "only": [list(run) for run in entry.only],
                        "note": entry.note,
                    }
                    for entry in self.entries
                ],
                "notes": list(self.notes),
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by `to_json`.

        Raises:
            InvalidJSON: when the text is not such JSON.
        """
        try:
            data = json.loads(text)
            entries = tuple(
                PlannedRange(
                    Range(row["start"], row["end"]),
                    row["hint"],
                    tuple(row["passes"]),
                    dict(row["options"]),
                    dict(row["linear"]),
                    tuple((int(first), int(last)) for first, last in row["only"]),
                    row["note"],
                    tuple(row["collectives"]),
                    dict(row["attention"]),
                )
                for row in data["ranges"]
            )
            return cls(int(data["max_size"]), entries, tuple(data["notes"]))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise InvalidJSON(f"this is not the JSON of a plan: {error!r}") from error

    def __str__(self) -> str:
        rows = [
            (
                "range",
                "sizes",
                "hint",
                "linear",
                "attention",
                "passes",
                "collectives",
                "options",
                "note",
            )
        ]
        served = Counter(self.table)
        for index, entry in enumerate(self.entries):
            rows.append(
                (
                    str(entry.range),
                    f"{served[index + 1]}",
                    "static" if entry.range.is_single_size else f"{entry.hint}",
                    _summary(entry.linear),
                    _summary(entry.attention),
                    ", ".join(entry.passes),
                    "; ".join(entry.collectives),
                    ", ".join(f"{name}={value}" for name, value in entry.options.items()),
                    entry.note,
                )
            )
        return "\n".join([*align(rows, right={1, 2}), *self.notes])


def _summary(chosen: Mapping[str, str]) -> str:
    """`packed`, where all layers have the same kernel, or `packed 4, gemv 1` by shapes."""
    counts = Counter(chosen.values())
    if len(counts) == 1 and not counts.keys() & {"inductor", "torch"}:
        return next(iter(counts))
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def align(rows: Iterable[tuple[str, ...]], right: Collection[int] = ()) -> list[str]:
    """Lay rows of cells out in columns two spaces apart; empty columns are left out.

    The first row is the heading; columns in `right` are aligned to the right.
    """
    table = list(rows)
    kept = [c for c in range(len(table[0])) if any(row[c] for row in table[1:])]
    widths = {c: max(len(row[c]) for row in table) for c in kept}
    return [
        "  ".join(
            row[c].rjust(widths[c]) if c in right else row[c].ljust(widths[c]) for c in kept
        ).rstrip()
        for row in table
    ]
