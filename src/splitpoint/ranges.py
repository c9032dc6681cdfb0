"""`Range`, `Plan` and the table that finds a size's range in one look-up."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, total_ordering
from typing import Any

from .errors import InvalidJSON, InvalidRange, SizeOutOfPlan

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
    lengths: tuple[tuple[str, int, int, int], ...] = ()
    """Where several dimensions change, for each: its name, the least and the greatest length, and
    the one that the compiler tunes for."""
    recorded: tuple[int, ...] = ()
    """The sizes whose kernels are recorded and replayed."""
    arguments: int = 1
    """For which kind of arguments it is, of `Plan.kinds`."""

    @property
    def tuned_for(self) -> str:
        """The size that the compiler tunes for, or lengths; "static" where there is but one."""
        if self.lengths:
            is_exact = all(a == b for _, a, b, _ in self.lengths)
            return "static" if is_exact else " x ".join(str(hint) for *_, hint in self.lengths)
        return "static" if self.range.is_single_size else f"{self.hint}"


@dataclass(frozen=True)
class Plan:
    """The ordered ranges over [1, max_size], with what each was given. Pure data.

    A single size wins over the range around it. `print(plan)` shows a table. A model that is
    called with arguments of several kinds has ranges for each.
    """

    max_size: int
    entries: tuple[PlannedRange, ...]
    notes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    """In what the arguments of its kinds of calls differ, where there are several."""

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The ranges in order, those of several kinds of arguments once."""
        return tuple(dict.fromkeys(entry.range for entry in self.entries))

    @cached_property
    def table(self) -> array[int]:
        """`table[size]` is 1 + the index in `entries` of the size's range, or `NOT_SERVED`; for
        arguments of the first kind.

        Holds max_size + 1 entries of 2 bytes.
        """
        return self._table(1)

    def _table(self, arguments: int) -> array[int]:
        table = array("H", bytes(2 * (self.max_size + 1)))
        # Wide first, so that what is narrower (a single size, the part of a range with a
        # condition) is written over it.
        for index in sorted(range(len(self.entries)), key=lambda i: -len(self.entries[i].range)):
            entry = self.entries[index]
            if entry.arguments != arguments:
                continue
            for start, end in entry.only or ((entry.range.start, entry.range.end),):
                table[start : end + 1] = array("H", [index + 1]) * (end - start + 1)
        return table

    def entry_for(self, size: int) -> PlannedRange:
        """The line of the plan that serves a size, in constant time; for arguments of the first
        kind.

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
                        "lengths": [list(each) for each in entry.lengths],
                        "recorded": list(entry.recorded),
                        "arguments": entry.arguments,
                    }
                    for entry in self.entries
                ],
                "notes": list(self.notes),
                "kinds": list(self.kinds),
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
                    tuple(
                        (str(n), int(a), int(b), int(h)) for n, a, b, h in row.get("lengths", ())
                    ),
                    tuple(int(size) for size in row.get("recorded", ())),
                    int(row.get("arguments", 1)),
                )
                for row in data["ranges"]
            )
            kinds = tuple(data.get("kinds", ()))
            return cls(int(data["max_size"]), entries, tuple(data["notes"]), kinds)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise InvalidJSON(f"this is not the JSON of a plan: {error!r}") from error

    def __str__(self) -> str:
        rows = [
            (
                "arguments",
                "range",
                "lengths",
                "sizes",
                "hint",
                "linear",
                "attention",
                "passes",
                "collectives",
                "options",
                "recorded",
                "note",
            )
        ]
        several = len(self.kinds) > 1
        served: Counter[int] = Counter()
        for arguments in {entry.arguments for entry in self.entries}:
            served += Counter(index for index in self._table(arguments) if index != NOT_SERVED)
        for index, entry in enumerate(self.entries):
            rows.append(
                (
                    str(entry.arguments) if several else "",
                    str(entry.range),
                    ", ".join(f"{name} {first}-{last}" for name, first, last, _ in entry.lengths),
                    "" if entry.lengths else f"{served[index + 1]}",
                    entry.tuned_for,
                    _summary(entry.linear),
                    _summary(entry.attention),
                    ", ".join(entry.passes),
                    "; ".join(entry.collectives),
                    ", ".join(f"{name}={value}" for name, value in entry.options.items()),
                    ", ".join(map(str, entry.recorded)),
                    entry.note,
                )
            )
        kinds = [f"arguments {number}: {kind}" for number, kind in enumerate(self.kinds, 1)]
        return "\n".join([*align(rows, right={0, 3, 4}), *kinds, *self.notes])


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
