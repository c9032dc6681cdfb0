"""Run the passes of one (piece, range) and count what they match."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..errors import PassError, SplitpointError
from ..ranges import Range
from ..torch_internals.pass_notes import keep_note
from .base import Found, Pass, compiling
from .repairs import REPAIRS, repair


@dataclass(frozen=True)
class MatchCount:
    """How often one pass matched in one piece for one range."""

    name: str
    piece: str
    """Fingerprint of the piece."""
    range: Range
    matches: int | None
    """None when the piece came from an Inductor cache that keeps no notes of passes."""
    notes: tuple[str, ...] = ()
    """What did not match, and why."""
    chosen: tuple[str, ...] = ()
    """What the piece was given, and why."""

    def kept(self) -> list[Any]:
        """What a store keeps of it, as JSON can hold it."""
        return [self.name, self.matches, list(self.notes), list(self.chosen)]

    @classmethod
    def from_kept(cls, kept: Sequence[Any], piece: str, range_: Range) -> MatchCount:
        """The inverse of `kept`, for a piece and a range."""
        name, matches, notes, chosen = kept
        return cls(name, piece, range_, matches, tuple(notes), tuple(chosen))


class PassManager:
    """The passes that apply to a range, as the one graph pass that Inductor calls."""

    def __init__(self, passes: Sequence[Pass], piece: str, range_: Range) -> None:
        self.passes = [p for p in passes if p.applies_to(range_)]
        self.piece = piece
        self.range = range_

    def __call__(self, graph: fx.Graph) -> None:
        """Run the passes in order.

        Raises:
            PassError: when one raises, returns no count, or leaves a broken graph.
        """
        repair(graph)
        with compiling(self.range):
            for index, given in enumerate(self.passes):
                where = f"pass {given.name} on {self.range}"
                try:
                    found = given(graph)
                    graph.lint()
                except SplitpointError:
                    raise
                except Exception as error:
                    raise PassError(f"{where} failed: {type(error).__name__}: {error}") from error
                if isinstance(found, int) and not isinstance(found, bool):
                    found = Found(found)
                if not isinstance(found, Found):
                    raise PassError(f"{where} must return its number of matches, got {found!r}")
                keep_note(json.dumps([index, found.matches, found.notes, found.chosen]))

    def uuid(self) -> str:
        """Identifies the passes, in order, with their settings."""
        return json.dumps([REPAIRS, *(p.uuid() for p in self.passes)])

    def matches(self, notes: Mapping[str, int]) -> list[MatchCount]:
        """What the passes found, one entry a pass, in order. `notes` is what they kept, with how
        often: Inductor's cache returns it with a graph for which no pass ran."""
        found: dict[int, Found] = {}
        for note, times in notes.items():
            index, matches, said, chosen = json.loads(note)
            before = found.get(index, Found(0))
            found[index] = Found(
                before.matches + times * matches,
                before.notes + tuple(said),
                before.chosen + tuple(chosen),
            )
        counts = []
        for index, given in enumerate(self.passes):
            own = found.get(index)
            parts = (None, (), ()) if own is None else (own.matches, own.notes, own.chosen)
            counts.append(MatchCount(given.name, self.piece, self.range, *parts))
        return counts
