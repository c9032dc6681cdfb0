"""The lanes of a model's plan, what they run, and how they come to be compiled."""

from __future__ import annotations

import contextlib
import logging
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from ..capture.assumptions import Assumption, runs, valid
from ..capture.dims import Lengths
from ..capture.regions import Regions
from ..capture.signature import Signature, differences
from ..compilers.stored import PieceCompiler
from ..config import Config
from ..errors import BackgroundError, GuardError
from ..graph.fixed import fixed
from ..graph.pieces import Piece
from ..graph.stitch import (
    Body,
    CompiledPiece,
    Stitched,
    stitch,
)
from ..passes import attention, linear
from ..passes.manager import MatchCount
from ..ranges import NOT_SERVED, Plan, Range
from ..store.store import Store
from .background import Background
from .binding import Binding
from .dispatch import Dispatch
from .garbage import rare_collection
from .kernel_choice import KernelChoice
from .lanes import Lane
from .lookup import MOST_PARTS, Lookup
from .plan_lanes import mend
from .recorded import recorder_for
from .second_measure import SecondMeasure

log = logging.getLogger("splitpoint")


class TooWide(Exception):
    """A compiled graph is valid for some of its lane's sizes only."""

    def __init__(self, valid: list[int], broken: list[Assumption]) -> None:
        super().__init__()
        self.valid = valid
        self.broken = broken


@dataclass
class Counts:
    """What happened so far."""

    compilations: int = 0
    loads: int = 0
    eager_calls: int = 0
    matches: list[MatchCount] = field(default_factory=list)

    def note(self, matches: Iterable[MatchCount]) -> None:
        """Add what passes matched, once for the ranges of several signatures that share a piece."""
        known = {(match.name, match.piece, match.range) for match in self.matches}
        self.matches += [m for m in matches if (m.name, m.piece, m.range) not in known]


class Program:
    """The lanes of one model, for all signatures that it is called with."""

    def __init__(self, config: Config, store: Store | None = None) -> None:
        self.config = config
        self.store = store
        self.dispatches: list[Dispatch] = []
        """By signature, in the order in which they came."""
        self.background = Background(self._compile_in_background)
        self.compiler = PieceCompiler(store, config.passes, config.compile_workers)
        self.counts = Counts()
        self.choice = KernelChoice(config)
        tuner = self.choice.linear_tuner
        self.second = SecondMeasure(config, tuner, self._compile_otherwise)
        self.lanes: list[Lane | None] = []
        """None for a lane that was split; lane i has table entry i + 1."""
        self.binding = Binding(config, self.lanes, store)
        self.runners: list[Stitched] = [_not_served]
        """By index of a lane and one; a lane not compiled yet compiles when called."""
        self.calls = [0]
        """Calls, likewise."""
        self.compiling = threading.RLock()
        """Held while one thread compiles; before `binding.lock` where both are."""

    def add(
        self,
        lanes: Sequence[Lane],
        notes: Sequence[str] = (),
        signature: Signature | None = None,
        regions: Regions | None = None,
        stand_in: Callable[..., Any] | None = None,
    ) -> Dispatch:
        """Take the lanes for a signature, which are not compiled yet."""
        table = array("H", bytes(2 * (self.config.max_size + 1)))
        dispatch = Dispatch(table, signature, regions, stand_in, tuple(notes))
        dispatch.recorder = recorder_for(self.config, signature)
        with self.binding.lock:
            for graph in {id(lane.graph): lane.graph for lane in lanes}.values():
                self.binding.look_past_freed(graph)
            for lane in lanes:
                self.add_lane(lane, dispatch)
            self.dispatches.append(dispatch)
        return dispatch

    def drop(self, dispatch: Dispatch) -> None:
        """Take no calls with a signature any more."""
        with self.binding.lock:
            self.dispatches.remove(dispatch)
            gone = set(map(id, dispatch.lanes))
            self.lanes[:] = [None if id(lane) in gone else lane for lane in self.lanes]

    # --- the plan ----------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan as it stands, with what was split and why."""
        entries = [
            replace(
                lane.planned,
                arguments=number,
                recorded=dispatch.recorder.recorded(lane) if dispatch.recorder else (),
            )
            for number, dispatch in enumerate(self.dispatches, 1)
            for lane in sorted(dispatch.lanes, key=lambda lane: lane.planned.range)
        ]
        signatures = [d.signature for d in self.dispatches if d.signature is not None]
        kinds = tuple(differences(signatures)) if len(signatures) > 1 else ()
        notes = dict.fromkeys(
            note
            for dispatch in self.dispatches
            for note in (*dispatch.notes, *(dispatch.recorder.notes() if dispatch.recorder else ()))
        )
        return Plan(self.config.max_size, tuple(entries), tuple(notes), kinds)

    def calls_by_kind(self) -> dict[str, int]:
        """Calls so far by kind of arguments, as `plan.kinds` names them."""
        ids = [set(map(id, dispatch.lanes)) for dispatch in self.dispatches]
        return {
            kind: sum(self.calls[i] for i, lane in enumerate(self.lanes, 1) if id(lane) in own)
            for kind, own in zip(self.plan.kinds, ids, strict=False)
        }

    def index_at(self, dispatch: Dispatch, lengths: Lengths) -> int:
        """The index among `runners` of what serves a call; 0 for none.

        Raises:
            CaptureError, CompileError, GuardError: where it has to be captured or compiled first.
        """
        if dispatch.dims.is_size_alone:
            (size,) = lengths
            return dispatch.table[size] if size <= self.config.max_size else NOT_SERVED
        return Lookup(self, dispatch).index_at(lengths)

    def position(self, lane: Lane) -> int:
        """The index of a lane among `runners`."""
        return next(index for index, each in enumerate(self.lanes, 1) if each is lane)

    def calls_by_range(self) -> dict[Range, int]:
        """Calls so far by range, those of all signatures together."""
        found: dict[Range, int] = {}
        for index, lane in enumerate(self.lanes, 1):
            if lane is not None:
                range_ = lane.planned.range
                found[range_] = found.get(range_, 0) + self.calls[index]
        return dict(sorted(found.items()))

    def failed(self) -> dict[Range, str]:
        """Ranges that could not be compiled in the background, and why."""
        lanes = {index: self.lanes[index - 1] for index in self.background.errors}
        return {
            lane.planned.range: str(self.background.errors[index])
            for index, lane in lanes.items()
            if lane is not None
        }

    def add_lane(self, lane: Lane, dispatch: Dispatch) -> int:
        """Take a lane for a signature; its index among `runners`."""
        self.lanes.append(lane)
        dispatch.lanes.append(lane)
        index = len(self.lanes)
        self.calls.append(0)
        self.runners.append(self._compile_when_called(index, dispatch))
        for first, last in runs(lane.sizes):
            dispatch.table[first : last + 1] = array("H", [index]) * (last - first + 1)
        return index

    def _dispatch_of(self, lane: Lane) -> Dispatch:
        return next(dispatch for dispatch in self.dispatches if lane in dispatch.lanes)

    def _compile_when_called(self, index: int, dispatch: Dispatch) -> Stitched:
        if self.config.background and dispatch.stand_in is not None:
            return self._serve_meanwhile(index, dispatch, dispatch.stand_in)

        def run(size: int, *args: Any) -> Any:
            self.compile(index)
            dispatch.report_compiled()
            return self.runners[dispatch.table[size]](size, *args)

        return run

    def _serve_meanwhile(
        self, index: int, dispatch: Dispatch, stand_in: Callable[..., Any]
    ) -> Stitched:
        """What serves a lane while it is compiled. The function that was compiled takes its place
        here, between two calls, and not in the thread that compiled it: the module cannot change
        while it is bound."""

        def run(size: int, *args: Any) -> Any:
            if (now := dispatch.table[size]) != index:  # it was split
                return self.runners[now](size, *args)
            lane = self.lanes[index - 1]
            if lane is not None and lane.body is not None:
                self._finish(index)
                return self.runners[index](size, *args)
            self.background.want(index, soon=True)
            covering = self._covering(lane, size)
            if covering is None:
                self.counts.eager_calls += 1
                covering = stand_in
            return covering(size, *args)

        return run

    def _covering(self, lane: Lane | None, size: int) -> Stitched | None:
        """A function compiled for another range of the same graph, that is right at a size."""
        for other in self.lanes:
            if (
                lane is not None
                and other is not None
                and other.run is not None
                and other.graph is lane.graph
                and other.planned.range.start <= size <= other.planned.range.end
                and valid(other.assumptions, [size])
            ):
                return other.run
        return None

    # --- compiling ---------------------------------------------------------------------

    def compile_all(self) -> None:
        """Compile every lane not compiled yet, with a progress bar on a terminal; in the
        background if so configured."""
        todo = [index for index, lane in enumerate(self.lanes, 1) if lane and lane.run is None]
        lanes = [lane for lane in self.lanes if lane and lane.run is None]
        if self.config.background and all(self._dispatch_of(lane).stand_in for lane in lanes):
            for index in todo:
                self.background.want(index)
            return
        self.choice.choose(lanes)
        self._announce(lanes)
        ranges = tqdm(todo, desc="compiling ranges", unit="range", disable=None)
        with self.compiling:
            made = self._compile(ranges)
            self.binding.pack(self.lanes[index - 1] for index in made)
            for index in made:
                self._finish(index)
        for dispatch in self.dispatches:
            if not dispatch.dims.is_size_alone:
                Lookup(self, dispatch).try_samples()

    def _announce(self, lanes: Sequence[Lane]) -> None:
        """Tell the compiler what lanes will ask for."""
        if self.config.backend != "eager":
            for lane in lanes:
                if not lane.graph.row.shares_compiles:
                    continue
                for piece in lane.graph.split.pieces.values():
                    prepared, trusted = _prepared(piece, lane)
                    self.compiler.expect(prepared.piece, lane.planned, prepared.options, trusted)

    def compile(self, index: int) -> None:
        """Compile a lane, splitting it where its graphs turn out not to be valid.

        Raises:
            GuardError: when it would have to be split and the configuration forbids it.
            CompileError: when the compiler fails.
        """
        with self.compiling:
            for made in self._compile([index]):
                self._finish(made)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for what is compiled in the background; False when that takes longer.

        Raises:
            BackgroundError: when some of it failed, each time.
        """
        if not self.background.wait(timeout_s):
            return False
        for index, error in self.background.errors.items():
            lane = self.lanes[index - 1]
            what = lane.planned.range if lane else "a range"
            raise BackgroundError(
                f"compiling {what} in the background failed, so its sizes are served by the model "
                f"itself: {error}"
            ) from error
        for index, lane in enumerate(self.lanes, 1):
            if lane is not None and lane.body is not None:
                self._finish(index)
        return True

    def _compile_in_background(self, index: int) -> None:
        with rare_collection(), self.compiling:
            for made in self._compile([index], self.background.check_stop):
                lane = self.lanes[made - 1]
                assert lane is not None
                assert lane.body is not None
                for weight, layout in lane.body.packed:
                    self.background.check_stop()
                    with self.binding.lock:
                        self.binding.weights.get(lane.graph.bound[weight], layout)
        for dispatch in self.dispatches:
            dispatch.report_compiled()

    def _compile(
        self, indices: Iterable[int], check_stop: Callable[[], None] = lambda: None
    ) -> list[int]:
        """Compile what lanes run, as far as that was not done; the table entries of the lanes that
        have it, several for one that was split."""
        made: dict[int, Lane] = {}
        with self.compiler.together():
            for index in indices:
                made |= self._prepare(index, check_stop)
        # Only now are its kernels there.
        todo = {index: lane for index, lane in made.items() if lane.body is None}
        self.second.decide(list(todo.values()))
        for lane in todo.values():
            lane.body = self._body(lane)
        return list(made)

    def _prepare(self, index: int, check_stop: Callable[[], None]) -> dict[int, Lane]:
        """Compile the pieces of a lane; it, or the parts that it was split into, by table
        entry."""
        lane = self.lanes[index - 1]
        if lane is None:
            return {}  # split before
        if lane.body is not None:
            return {index: lane}  # another thread was first
        lane.compiled, lane.assumptions = {}, ()
        try:
            self.choice.choose([lane])
            for piece in lane.graph.split.pieces.values():
                check_stop()
                self._compile_piece(piece, lane)
        except TooWide as narrowed:
            parts = self._parts(lane, narrowed)
            dispatch = self._dispatch_of(lane)
            with self.binding.lock:
                self.lanes[index - 1] = None
                dispatch.lanes.remove(lane)
                added = [self.add_lane(part, dispatch) for part in parts]
            parted: dict[int, Lane] = {}
            for part in added:
                parted |= self._prepare(part, check_stop)
            return parted
        lane.planned = replace(lane.planned, collectives=self._collectives(lane))
        return {index: lane}

    def _body(self, lane: Lane) -> Body:
        graph = lane.graph
        split = attention.rewrite(graph.split, lane.attention or {})
        return stitch(split, graph.inputs, lane.compiled, graph.argument_count, graph.result)

    def _compile_otherwise(self, wanted: Sequence[tuple[Lane, Sequence[str]]]) -> None:
        """Compile pieces of lanes that are like some of the plan's, where they are right for all
        sizes."""
        with self.compiler.together():
            for lane, names in wanted:
                for name in names:
                    piece = lane.graph.split.pieces[name]
                    prepared, trusted = _prepared(piece, lane)
                    self.compiler.expect(prepared.piece, lane.planned, prepared.options, trusted)
            for lane, names in wanted:
                for name in names:
                    with contextlib.suppress(TooWide):
                        self._compile_piece(lane.graph.split.pieces[name], lane, counted=False)

    def _finish(self, index: int) -> None:
        """Let a lane that was prepared run."""
        with self.binding.lock:
            lane = self.lanes[index - 1]
            if lane is not None and lane.run is None:
                assert lane.body is not None
                self._run(index, lane.body)

    def start(self, dispatch: Dispatch, bodies: Sequence[Body]) -> None:
        """Let the lanes of a signature, in order, run functions that were made before, for a
        module that was just proven to be as it was."""
        # The watches are made with the first function of a graph, and go by what is packed.
        for lane, body in zip(dispatch.lanes, bodies, strict=True):
            lane.body = body
        self.binding.pack(dispatch.lanes)
        first = len(self.lanes) - len(bodies) + 1
        for index, body in enumerate(bodies, first):
            self._run(index, body, proven=True)

    def _run(self, index: int, body: Body, proven: bool = False) -> None:
        """Let the lane of a table entry run a stitched function."""
        lane = self.lanes[index - 1]
        assert lane is not None
        lane.run = self.binding.stitch(lane, body, proven, self._dispatch_of(lane).recorder)
        self.runners[index] = lane.recorded or lane.run

    def _compile_piece(self, piece: Piece, lane: Lane, counted: bool = True) -> None:
        """Have the piece in the lane's `compiled`, with what that assumed."""
        name = piece.fingerprint
        if self.config.backend == "eager":
            from ..compilers import eager

            lane.artifacts[name] = None
            sources = linear.unchanged(piece).sources
            lane.compiled[name] = CompiledPiece(eager.compile_piece(piece), sources, piece.takes)
            return
        prepared, trusted = _prepared(piece, lane)
        made = self.compiler.compile(prepared.piece, lane.planned, prepared.options, trusted)
        compiled = made.compiled
        if counted:
            self.counts.compilations += made.origin == "compiled"
            self.counts.loads += made.origin == "store"
            self.counts.note(replace(m, piece=name) for m in compiled.matches)
        lane.artifacts[name] = made.key
        log.info("piece %s for %s: %s", name, lane.planned.range, made.origin)
        right = valid(compiled.assumptions, lane.sizes)
        if len(right) < len(lane.sizes):
            raise TooWide(
                right, [a for a in compiled.assumptions if not all(map(a.holds, lane.sizes))]
            )
        takes = prepared.piece.takes
        lane.compiled[name] = CompiledPiece(compiled.call, prepared.sources, takes, compiled.steps)
        lane.assumptions += compiled.assumptions

    def _collectives(self, lane: Lane) -> tuple[str, ...]:
        """What the passes chose in the lane's pieces, each kind once."""
        chosen = (
            line
            for count in self.counts.matches
            if count.range == lane.planned.range
            for line in count.chosen
        )
        return tuple(dict.fromkeys(chosen))

    def _parts(self, lane: Lane, narrowed: TooWide) -> list[Lane]:
        range_ = lane.planned.range
        why = "; ".join(map(str, narrowed.broken))
        right = set(narrowed.valid)
        parts: list[list[int]] = []
        for size in lane.sizes:
            if parts and (parts[-1][-1] in right) == (size in right):
                parts[-1].append(size)
            else:
                parts.append([size])
        if self.config.on_guard == "error" or len(parts) == 1 or len(parts) > MOST_PARTS:
            shown = ", ".join(
                f"[{part[0]},{part[-1]}]" for part in parts[:3] if part[0] not in right
            )
            point = (parts[1] if len(parts) > 1 else parts[0])[0] - 1
            raise GuardError(
                f"the graph of {range_} is not valid at {shown}: it needs {why}. "
                f"{mend(self.config, point)}"
            )
        log.info("%s is split into %d ranges: the graph needs %s", range_, len(parts), why)
        return [
            Lane(
                self.config.planned(Range(part[0], part[-1]), note=f"split from {range_}: {why}"),
                lane.graph,
                part,
            )
            for part in parts
        ]


def _prepared(piece: Piece, lane: Lane) -> tuple[linear.Prepared, list[int]]:
    """A piece with the kernels of a lane, and which of its inputs need no check at a call."""
    if piece.fingerprint not in lane.prepared:
        bound = lane.graph.bound_of[piece.fingerprint]
        prepared = linear.rewrite(piece, bound, lane.kernels or {})
        lengths = {name: first for name, first, last, _ in lane.planned.lengths if first == last}
        prepared = replace(prepared, piece=fixed(prepared.piece, lengths))
        # Guards see a change of what the module holds; what else comes may be anything.
        trusted = [i for i, (source, _) in enumerate(prepared.sources) if source in bound]
        lane.prepared[piece.fingerprint] = prepared, trusted
    return lane.prepared[piece.fingerprint]


def _not_served(size: int, *args: Any) -> Any:
    raise AssertionError(f"size {size} was dispatched although no lane serves it")
