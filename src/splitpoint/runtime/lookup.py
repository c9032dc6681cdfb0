"""What serves a call with several dynamic dimensions: looked up once for the lengths it has.

A table over all lengths would be large, and what a graph needs of them is known only once it is
captured and compiled: so the conditions are evaluated when lengths come for the first time.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..capture.assumptions import failing
from ..capture.dims import Lengths
from ..errors import CaptureError, GuardError
from ..ranges import NOT_SERVED
from .dispatch import Dispatch
from .lanes import Graph, Lane
from .plan_lanes import exact_lane, lane_of, samples_in

if TYPE_CHECKING:
    from .program import Program

log = logging.getLogger("splitpoint")

MOST_KNOWN = 2**16
"""Lengths of several dimensions that are looked up anew after so many others."""

MOST_PARTS = 8
"""A range that would fall into more parts than this is refused instead."""


class Lookup:
    """Finds, or makes, the lanes of a program for one signature."""

    def __init__(self, program: Program, dispatch: Dispatch) -> None:
        self.program = program
        self.dispatch = dispatch

    def index_at(self, lengths: Lengths) -> int:
        """The index among the program's runners of what serves a call; 0 for none.

        Raises:
            CaptureError, CompileError, GuardError: where it has to be captured or compiled first.
        """
        if (index := self.dispatch.known.get(lengths)) is None:
            index = self._index_of(lengths)
            if len(self.dispatch.known) >= MOST_KNOWN:
                self.dispatch.known.clear()
            self.dispatch.known[lengths] = index
        return index

    def _index_of(self, lengths: Lengths) -> int:
        dims = self.dispatch.dims
        size = dims.size_at(lengths)
        within = all(0 < n <= most for n, most in zip(lengths, dims.largest, strict=True))
        if not within or size > self.program.config.max_size:
            return NOT_SERVED
        with self.program.compiling:
            fits = [lane for lane in self.dispatch.lanes if lane.fits(lengths, size)]
            for lane in fits:
                if self._is_right(lane, lengths):
                    return self.program.position(lane)
            graphs = {id(lane.graph): lane.graph for lane in self.dispatch.lanes}.values()
            able = (graph for graph in graphs if not graph.is_loaded and graph.serves(lengths))
            graph = next(able, None)
            if graph is None:
                if self.dispatch.capture_at is None:
                    return NOT_SERVED
                graph = self.dispatch.capture_at(lengths)
            entry = self.program.config.plan().entry_for(size)
            for fixed in ({}, *({index: n} for index, n in enumerate(lengths))):
                lane = lane_of(entry, dims, graph, fixed)
                if lane.fits(lengths, size) and not any(
                    lane.planned.lengths == each.planned.lengths for each in fits
                ):
                    self.program.add_lane(lane, self.dispatch)
                    if self._is_right(lane, lengths):
                        return self.program.position(lane)
                    self._remove(lane)
            return self.program.position(self._add_exact(graph, lengths))

    def _remove(self, lane: Lane) -> None:
        with self.program.binding.lock:
            self.program.lanes[self.program.position(lane) - 1] = None
            self.dispatch.lanes.remove(lane)

    def _is_right(self, lane: Lane, lengths: Lengths) -> bool:
        """Whether a lane's code is right for lengths that it fits; it is compiled for that."""
        self.program.compile(self.program.position(lane))
        return all(assumption.holds(*lengths) for assumption in lane.assumptions)

    def _add_exact(self, graph: Graph, lengths: Lengths) -> Lane:
        """A lane for these lengths alone, where none for more is right."""
        exact = [lane for lane in self.dispatch.lanes if lane.is_exact]
        if len(exact) >= MOST_PARTS + len(self.program.config.compile_shapes):
            broken = {
                str(a) for lane in self.dispatch.lanes for a in failing(lane.assumptions, *lengths)
            }
            raise GuardError(
                f"the graphs are not valid for {lengths}, nor were they for {len(exact)} others: "
                f"they need {'; '.join(broken)}"
            )
        lane = exact_lane(self.program.config, self.dispatch.dims, graph, lengths)
        self.program.add_lane(lane, self.dispatch)
        self.program.compile(self.program.position(lane))
        return lane

    def try_samples(self) -> None:
        """Find what serves some calls of each range, compiling what no range's own code is right
        for, so that calls have less to wait for."""
        dims = self.dispatch.dims
        for entry in self.program.config.plan().entries:
            for lengths in samples_in(entry.range, dims, dims.typical):
                try:
                    self.index_at(lengths)
                except (CaptureError, GuardError) as error:
                    log.info("calls with lengths %s are refused: %s", lengths, error)
