"""What a compiled model did so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ..passes.manager import MatchCount
from ..ranges import Range, align

if TYPE_CHECKING:
    from .program import Program

K = TypeVar("K")


@dataclass(frozen=True)
class Stats:
    """What a compiled model did so far. `print(stats)` shows a table."""

    captures: int = 0
    """Graphs captured; more than one when the model branches on the size."""
    pieces: int = 0
    """Pieces of all graphs, equal ones counted each."""
    unique_pieces: int = 0
    """Pieces that differ: what is compiled, once per range."""
    compilations: int = 0
    """Pieces compiled, ranges counted each, also those that share code."""
    loads: int = 0
    """Compiled pieces taken from the store, ranges counted each."""
    dispatches: dict[Range, int] = field(default_factory=dict)
    """Calls by range."""
    replays: int = 0
    """Calls that replayed a recorded size."""
    packed_bytes: int = 0
    """Memory of weights in other layouts, beside the module's own."""
    mapped_bytes: int = 0
    """Of `packed_bytes`, what is as a file of the store has it, whose pages processes share."""
    packings: int = 0
    """How often a weight was packed: what is mapped was not, unless its file had to be written."""
    freed_bytes: int = 0
    """Memory of the module's own weights that was given back."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Calls by kind of arguments, where there are several."""
    eager_calls: int = 0
    """Calls that ran the model itself: size 0, sizes out of plan if allowed, and those of ranges
    that are compiled in the background (which `dispatches` counts too)."""
    failed: dict[Range, str] = field(default_factory=dict)
    """Ranges that could not be compiled in the background, and why; the model serves them."""
    matches: tuple[MatchCount, ...] = ()
    """What the passes matched, by (pass, piece, range)."""
    occurrences: dict[tuple[Range, str], int] = field(default_factory=dict)
    """How often each compiled range calls each piece (by fingerprint)."""

    def matched(self, name: str) -> dict[Range, int]:
        """Matches of a pass by range of the plan, with those of equal pieces counted each. A
        piece whose matches are not known counts as none."""
        counts: dict[Range, int] = {}
        for count in self.matches:
            if count.name == name and count.range in self.dispatches:
                times = self.occurrences.get((count.range, count.piece), 1)
                counts[count.range] = counts.get(count.range, 0) + times * (count.matches or 0)
        return counts

    def __str__(self) -> str:
        rows = [("range", "calls")]
        rows += [(str(range_), str(calls)) for range_, calls in self.dispatches.items()]
        rows += [(f"arguments: {kind}", str(calls)) for kind, calls in self.kinds.items()]
        if self.eager_calls:
            rows.append(("eager", str(self.eager_calls)))
        heading = (
            f"{self.captures} captured, {self.pieces} pieces of which {self.unique_pieces} unique, "
            f"{self.compilations} compilations"
        )
        if self.loads:
            heading += f", {self.loads} loaded"
        if self.replays:
            heading += f", {self.replays} replays"
        if self.packed_bytes:
            heading += f", {self.packed_bytes / 2**20:.1f} MiB of packed weights"
        if self.mapped_bytes:
            heading += f", {self.mapped_bytes / 2**20:.1f} of them mapped"
        if self.freed_bytes:
            heading += f", {self.freed_bytes / 2**20:.1f} MiB of original weights freed"
        table = align(rows, right={1}) if len(rows) > 1 else []
        by_pass: dict[str, int] = {}
        for count in self.matches:
            by_pass[count.name] = by_pass.get(count.name, 0) + (count.matches or 0)
        failed = [f"{range_} is not compiled: {why}" for range_, why in self.failed.items()]
        passes = [f"pass {name} matched {matches} times" for name, matches in by_pass.items()]
        notes = dict.fromkeys(f"{c.name}: {note}" for c in self.matches for note in c.notes)
        return "\n".join([heading, *table, *failed, *passes, *notes])


def stats_of(programs: Sequence[Program], eager_calls: int) -> Stats:
    """What some programs did, with calls of the model itself that none of them counted."""
    lanes = [lane for program in programs for lane in program.lanes if lane]
    graphs = list({id(lane.graph): lane.graph for lane in lanes}.values())
    regions = [dispatch.regions for program in programs for dispatch in program.dispatches]
    counts = [program.counts for program in programs]
    return Stats(
        captures=sum(1 if each is None else len(each.captures) for each in regions),
        pieces=sum(graph.piece_count for graph in graphs),
        unique_pieces=len({name for graph in graphs for name in graph.unique}),
        compilations=sum(each.compilations for each in counts),
        loads=sum(each.loads for each in counts),
        dispatches=dict(sorted(_added(program.calls_by_range() for program in programs).items())),
        kinds=_added(program.calls_by_kind() for program in programs),
        replays=sum(
            dispatch.recorder.replays
            for program in programs
            for dispatch in program.dispatches
            if dispatch.recorder is not None
        ),
        packed_bytes=sum(program.binding.weights.nbytes for program in programs),
        mapped_bytes=sum(program.binding.weights.mapped_bytes for program in programs),
        packings=sum(program.binding.weights.packings for program in programs),
        freed_bytes=sum(program.binding.originals.nbytes for program in programs),
        eager_calls=sum(each.eager_calls for each in counts) + eager_calls,
        failed={range_: why for program in programs for range_, why in program.failed().items()},
        matches=tuple(match for each in counts for match in each.matches),
        occurrences=dict(
            Counter(
                (lane.planned.range, step[1].removeprefix("p_"))
                for lane in lanes
                if lane.body is not None
                for step in lane.body.steps
                if step is not None and step[0] == "piece"
            )
        ),
    )


def _added(counts: Iterable[Mapping[K, int]]) -> dict[K, int]:
    total: dict[K, int] = {}
    for each in counts:
        for key, count in each.items():
            total[key] = total.get(key, 0) + count
    return total
