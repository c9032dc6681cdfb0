"""Run passes as the one custom pass that Inductor calls, and count what they match."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .. import _torch
from ..errors import PassError
from ..ranges import Range
from .base import Pass, compiling


@dataclass(frozen=True)
class MatchCount:
    """How often one pass matched in one piece for one range."""

    name: str
    piece: str
    """Fingerprint of the piece."""
    range: Range
    matches: int | None
    """None when the piece came compiled from Inductor's cache, where no pass runs."""


class PassManager(_torch.CustomGraphPass):
    """The passes of one (piece, range), as the one custom pass Inductor calls."""

    def __init__(self, passes: Sequence[Pass], piece: str, range_: Range) -> None:
        self.passes = [p for p in passes if p.applies_to(range_)]
        self.piece = piece
        self.range = range_
        self.counts: dict[str, int] = {}

    def __call__(self, graph: fx.Graph) -> None:
        """Run the passes in order.

        Raises:
            PassError: when one raises, returns no count, or leaves a broken graph.
        """
        with compiling(self.range):
            for given in self.passes:
                where = f"pass {given.name} on {self.range}"
                try:
                    matches = given(graph)
                    graph.lint()
                except Exception as error:
                    raise PassError(f"{where} failed: {type(error).__name__}: {error}") from error
                if not isinstance(matches, int):
                    raise PassError(f"{where} must return its number of matches, got {matches!r}")
                self.counts[given.name] = self.counts.get(given.name, 0) + matches

    def uuid(self) -> str:
        """Identifies the passes and the range in Inductor's cache keys."""
        return json.dumps([str(self.range), [p.uuid() for p in self.passes]])

    def matches(self) -> list[MatchCount]:
        """What was counted, one entry a pass."""
        return [
            MatchCount(p.name, self.piece, self.range, self.counts.get(p.name)) for p in self.passes
        ]
