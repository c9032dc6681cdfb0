"""A model's graphs, the lanes of its plan, and the table that sends a size to its lane."""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from .background import Background
from .compilers.stored import PieceCompiler
from .config import Config
from .errors import BackgroundError, GuardError, StateChanged, WeightsFreed
from .freed import Originals, convert_whole_only, is_freed, plain_reads, reads_unchecked, unread
from .garbage import rare_collection
from .graph.assumptions import Assumption, runs, valid
from .graph.pieces import Piece
from .graph.stitch import (
    Body,
    CompiledPiece,
    Guard,
    Native,
    Packed,
    Stitched,
    assemble,
    rebind,
    stitch,
)
from .kernel_choice import KernelChoice
from .lanes import Graph, Lane
from .module_watch import Rest, watch
from .packing import PackedWeights
from .passes import attention, linear
from .passes.manager import MatchCount
from .ranges import NOT_SERVED, Plan, PlannedRange, Range
from .runner.native import native
from .store.store import Store

log = logging.getLogger("splitpoint")

MOST_PARTS = 8
"""A range that would fall into more parts than this is refused instead."""


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


class Program:
    """The lanes of one model and the table over sizes."""

    def __init__(
        self,
        config: Config,
        lanes: Sequence[Lane],
        notes: Sequence[str] = (),
        store: Store | None = None,
        stand_in: Callable[..., Any] | None = None,
        when_compiled: Callable[[Program], None] = lambda _: None,
    ) -> None:
        """`stand_in` takes what a stitched function takes and runs the model itself, for
        `config.background`; without one, calls wait for what they need. `when_compiled` is
        called, in whatever thread it is, when the last lane was compiled after a call."""
        self.config = config
        self.stand_in = stand_in
        self.when_compiled = when_compiled
        self.background = Background(self._compile_in_background)
        self.compiler = PieceCompiler(store, config.passes, config.compile_workers)
        self.notes = tuple(notes)
        self.counts = Counts()
        self.weights = PackedWeights()
        self._lock = threading.RLock()
        """Held while functions are made and bound, and weights packed and freed."""
        self.originals = Originals(self._lock)
        self._frees = False
        """Whether original weights are freed when the module changes."""
        self.choice = KernelChoice(config)
        self.lanes: list[Lane | None] = []
        """None for a lane that was split; lane i has table entry i + 1."""
        self.table = array("H", bytes(2 * (config.max_size + 1)))
        self.runners: list[Stitched] = [_not_served]
        """By table entry; a lane not compiled yet compiles when called."""
        self.calls = [0]
        """Calls by table entry."""
        self._compiling = threading.RLock()
        """Held while one thread compiles; before `_lock` where both are."""
        for lane in lanes:
            self._add(lane)
        if config.free_original_weights:
            for graph in self._graphs():
                graph.check = self.originals.around(graph.check)
                graph.explain = self.originals.around(graph.explain)
                if graph.check_facts is not None:
                    graph.check_facts = self.originals.around(graph.check_facts)
                if graph.check_rest is not None:
                    graph.check_rest = self.originals.around(graph.check_rest)

    # --- the plan ----------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan as it stands, with what was split and why."""
        lanes = sorted((lane for lane in self.lanes if lane), key=lambda lane: lane.planned.range)
        return Plan(self.config.max_size, tuple(lane.planned for lane in lanes), self.notes)

    def dispatches(self) -> dict[Range, int]:
        """Calls so far by range."""
        pairs = [
            (lane.planned.range, self.calls[index + 1])
            for index, lane in enumerate(self.lanes)
            if lane
        ]
        return dict(sorted(pairs))

    def _graphs(self) -> list[Graph]:
        return list({id(lane.graph): lane.graph for lane in self.lanes if lane}.values())

    def failed(self) -> dict[Range, str]:
        """Ranges that could not be compiled in the background, and why."""
        lanes = {index: self.lanes[index - 1] for index in self.background.errors}
        return {
            lane.planned.range: str(self.background.errors[index])
            for index, lane in lanes.items()
            if lane is not None
        }

    def _add(self, lane: Lane) -> int:
        self.lanes.append(lane)
        index = len(self.lanes)
        self.calls.append(0)
        self.runners.append(self._compile_when_called(index))
        for first, last in runs(lane.sizes):
            self.table[first : last + 1] = array("H", [index]) * (last - first + 1)
        return index

    def _compile_when_called(self, index: int) -> Stitched:
        if self.config.background and self.stand_in is not None:
            return self._serve_meanwhile(index, self.stand_in)

        def run(size: int, *args: Any) -> Any:
            self.compile(index)
            self.report_compiled()
            return self.runners[self.table[size]](size, *args)

        return run

    def _serve_meanwhile(self, index: int, stand_in: Callable[..., Any]) -> Stitched:
        """What serves a lane while it is compiled. The function that was compiled takes its place
        here, between two calls, and not in the thread that compiled it: the module cannot change
        while it is bound."""

        def run(size: int, *args: Any) -> Any:
            if (now := self.table[size]) != index:  # it was split
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
        if self.config.background and self.stand_in is not None:
            for index in todo:
                self.background.want(index)
            return
        lanes = [lane for lane in self.lanes if lane and lane.run is None]
        self.choice.choose(lanes)
        self._announce(lanes)
        ranges = tqdm(todo, desc="compiling ranges", unit="range", disable=None)
        with self._compiling:
            for index in self._compile(ranges):
                self._finish(index)

    def _announce(self, lanes: Sequence[Lane]) -> None:
        """Tell the compiler what lanes will ask for."""
        if self.config.backend != "eager":
            for lane in lanes:
                for piece in lane.graph.split.pieces.values():
                    prepared, trusted = _prepared(piece, lane)
                    self.compiler.expect(prepared.piece, lane.planned, prepared.options, trusted)

    def compile(self, index: int) -> None:
        """Compile a lane, splitting it where its graphs turn out not to be valid.

        Raises:
            GuardError: when it would have to be split and the configuration forbids it.
            CompileError: when the compiler fails.
        """
        with self._compiling:
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
        with rare_collection(), self._compiling:
            for made in self._compile([index], self.background.check_stop):
                lane = self.lanes[made - 1]
                assert lane is not None
                assert lane.body is not None
                for weight, layout in lane.body.packed:
                    self.background.check_stop()
                    with self._lock:
                        self.weights.get(lane.graph.bound[weight], layout)
        self.report_compiled()

    def report_compiled(self) -> None:
        """Call `when_compiled` if all lanes are."""
        if all(lane is None or lane.body is not None for lane in self.lanes):
            self.when_compiled(self)

    def _compile(
        self, indices: Iterable[int], check_stop: Callable[[], None] = lambda: None
    ) -> list[int]:
        """Compile what lanes run, as far as that was not done; the table entries of the lanes that
        have it, several for one that was split."""
        bodies: dict[int, Body] = {}
        with self.compiler.together():
            for index in indices:
                bodies |= self._prepare(index, check_stop)
        for index, body in bodies.items():  # only now are its kernels there
            lane = self.lanes[index - 1]
            assert lane is not None
            lane.body = body
        return list(bodies)

    def _prepare(self, index: int, check_stop: Callable[[], None]) -> dict[int, Body]:
        """What a lane is to run, or the parts that it was split into, by table entry."""
        lane = self.lanes[index - 1]
        if lane is None:
            return {}  # split before
        if lane.body is not None:
            return {index: lane.body}  # another thread was first
        compiled: dict[str, CompiledPiece] = {}
        assumptions: list[Assumption] = []
        try:
            self.choice.choose([lane])
            for fingerprint, piece in lane.graph.split.pieces.items():
                check_stop()
                compiled[fingerprint], assumed = self._compile_piece(piece, lane)
                assumptions += assumed
        except TooWide as narrowed:
            parts = self._parts(lane, narrowed)
            with self._lock:
                self.lanes[index - 1] = None
                added = [self._add(part) for part in parts]
            parted: dict[int, Body] = {}
            for part in added:
                parted |= self._prepare(part, check_stop)
            return parted
        lane.planned = replace(lane.planned, collectives=self._collectives(lane))
        lane.assumptions = tuple(assumptions)
        graph = lane.graph
        split = attention.rewrite(graph.split, lane.attention or {})
        body = stitch(split, graph.inputs, compiled, graph.argument_count, graph.result)
        return {index: body}

    def _finish(self, index: int) -> None:
        """Let a lane that was prepared run."""
        with self._lock:
            lane = self.lanes[index - 1]
            if lane is not None and lane.run is None:
                assert lane.body is not None
                self._run(index, lane.body)

    def start(self, bodies: Sequence[Body]) -> None:
        """Let the lanes, in order, run functions that were made before, for a module that was
        just proven to be as it was."""
        # The watches are made with the first function of a graph, and go by what is packed.
        for lane, body in zip(self.lanes, bodies, strict=True):
            assert lane is not None
            for index, layout in body.packed:
                self.weights.get(lane.graph.bound[index], layout)
        for index, body in enumerate(bodies, 1):
            self._run(index, body, proven=True)

    def _run(self, index: int, body: Body, proven: bool = False) -> None:
        """Let the lane of a table entry run a stitched function."""
        lane = self.lanes[index - 1]
        assert lane is not None
        lane.run = self._stitch(lane, body, proven)
        self.runners[index] = lane.run

    def _compile_piece(
        self, piece: Piece, lane: Lane
    ) -> tuple[CompiledPiece, tuple[Assumption, ...]]:
        if self.config.backend == "eager":
            from .compilers import eager

            lane.artifacts[piece.fingerprint] = None

            return CompiledPiece(eager.compile_piece(piece), linear.unchanged(piece).sources), ()
        prepared, trusted = _prepared(piece, lane)
        made = self.compiler.compile(prepared.piece, lane.planned, prepared.options, trusted)
        compiled = made.compiled
        self.counts.compilations += not made.loaded
        self.counts.loads += made.loaded
        self.counts.matches += [replace(m, piece=piece.fingerprint) for m in compiled.matches]
        lane.artifacts[piece.fingerprint] = made.key
        done = "loaded" if made.loaded else "compiled"
        log.info("%s piece %s for %s", done, piece.fingerprint, lane.planned.range)
        right = valid(compiled.assumptions, lane.sizes)
        if len(right) < len(lane.sizes):
            raise TooWide(
                right, [a for a in compiled.assumptions if not all(map(a.holds, lane.sizes))]
            )
        callable_ = CompiledPiece(compiled.call, prepared.sources, compiled.steps)
        return callable_, compiled.assumptions

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
            raise GuardError(
                f"the graph of {range_} is not valid at {shown}: it needs {why}. Put a split "
                f"point at {(parts[1] if len(parts) > 1 else parts[0])[0] - 1}"
                + (", or set on_guard='split'" if self.config.on_guard == "error" else "")
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

    def _stitch(self, lane: Lane, body: Body, proven: bool) -> Stitched:
        graph = lane.graph
        guard = None
        if not proven:  # the module may hold other tensors than at capture
            self.refresh(graph)
        if self.config.module_guards == "every_call":
            guard = self._guard(graph)
        lane.body = body
        lane.packed = body.packed
        repack = Packed(self.weights.fresh, self.repack) if graph.watch is None else None
        run = assemble(body, guard, repack, self._native(body))
        self._rebind(run, lane)
        if not proven:
            self._renew_watch(graph)
        return run

    def _native(self, body: Body) -> Native | None:
        return native(body) if self.config.runner == "native" else None

    def _guard(self, graph: Graph) -> Guard:
        def refresh() -> None:
            self.refresh(graph)

        if graph.watch is None and graph.facts is not None and graph.check_rest is not None:
            graph.watch = watch(graph.owner, graph.bound, self.weights.packed_ids())
            if graph.watch is not None:
                graph.rest = self._rest(graph)
        if graph.watch is None or graph.rest is None:
            return Guard((graph.check,), refresh, graph.facts)
        return Guard((graph.watch.check, graph.rest), refresh, ())

    def _rest(self, graph: Graph) -> Rest:
        assert graph.owner is not None
        assert graph.check_rest is not None
        for other in self._graphs():
            if other.rest is not None and other.check_rest == graph.check_rest:
                return other.rest
        check = graph.check_facts or graph.check
        with torch.no_grad():
            return Rest(check, graph.check_rest, graph.owner, lambda: set(map(id, graph.bound)))

    def _rebind(self, run: Stitched, lane: Lane) -> None:
        bound = lane.graph.bound
        packed = {
            (index, layout): self.weights.get(bound[index], layout) for index, layout in lane.packed
        }
        if self.config.module_guards == "first_call" and lane.body is not None:
            reads_unchecked(self, [bound[index] for index in plain_reads(lane.body)])
        # Where there is a watch, the function looks at none of the facts.
        facts = lane.graph.facts if lane.graph.watch is None else ()
        rebind(run, bound, facts, packed)

    # --- the module --------------------------------------------------------------------

    def refresh(self, graph: Graph) -> None:
        """Bind the tensors that the module holds now in every function of the graph.

        Raises:
            StateChanged: when more changed than which tensors the module holds.
        """
        self._check(graph)
        with self._lock:
            graph.bind()
            self.weights.repack()
            self.weights.retain([tensor for each in self._graphs() for tensor in each.bound])
            for lane in self.lanes:
                if lane and lane.graph is graph and lane.run is not None:
                    self._rebind(lane.run, lane)
            if self._frees:
                self._free()
            # Of other graphs the watches see what was freed, and they come here too.
            self._renew_watch(graph)

    def free_originals(self) -> None:
        """Free the weights that every range reads in packed copies only, if so configured, now
        and whenever they are given data. Everything is compiled."""
        if not self.config.free_original_weights:
            return
        with self._lock:
            self._frees = True
            self._free()
            for graph in self._graphs():
                self._renew_watch(graph)
        log.info("freed %.1f MiB of original weights", self.originals.nbytes / 2**20)

    def _free(self) -> None:
        runs_: list[tuple[Body, Sequence[torch.Tensor]]] = []
        others: list[torch.Tensor] = []
        for lane in self.lanes:
            if lane is not None:
                assert lane.body is not None
                runs_.append((lane.body, lane.graph.bound))
        for graph in self._graphs():
            if graph.owner is not None:
                others += [*graph.owner.parameters(), *graph.owner.buffers()]
        bound = [each for _, bound in runs_ for each in bound]
        self.originals.free(unread(runs_, others), bound, self)
        for graph in self._graphs():
            if graph.owner is not None:
                convert_whole_only(graph.owner)
        self.weights.note()

    def _renew_watch(self, graph: Graph) -> None:
        if graph.watch is not None:
            graph.watch.renew(graph.bound, self.weights.packed_ids())
        if graph.rest is not None:
            graph.rest.renew()

    def repack(self) -> None:
        """Bring packed copies of weights that were updated in place up to date."""
        with self._lock:
            self.weights.repack()
            if self._frees:
                self._free()

    def _check(self, graph: Graph) -> None:
        with torch.no_grad():  # as it was at capture, and is around every call
            unchanged = graph.check()
        if not unchanged:
            if any(is_freed(each) and not self.originals.owns(each) for each in graph.bound):
                raise WeightsFreed(
                    "another compiled model freed weights of this module "
                    "(free_original_weights=True): load them anew (load_state_dict), or compile "
                    "that one with free_original_weights=False"
                )
            raise StateChanged(
                f"the module, or something global that it reads, is not as it was when it was "
                f"captured: {graph.explain()}. Change it back, or call reset() to capture and "
                f"compile anew"
            )


def _prepared(piece: Piece, lane: Lane) -> tuple[linear.Prepared, list[int]]:
    """A piece with the kernels of a lane, and which of its inputs need no check at a call."""
    if piece.fingerprint not in lane.prepared:
        bound = lane.graph.bound_of[piece.fingerprint]
        prepared = linear.rewrite(piece, bound, lane.kernels or {})
        # Guards see a change of what the module holds; what else comes may be anything.
        trusted = [i for i, (source, _) in enumerate(prepared.sources) if source in bound]
        lane.prepared[piece.fingerprint] = prepared, trusted
    return lane.prepared[piece.fingerprint]


def lanes_of(
    config: Config,
    owner: array[int],
    graphs: Sequence[Graph],
    boundaries: dict[int, str],
) -> list[Lane]:
    """The lanes of a configuration's plan over one or more graphs.

    A range whose sizes belong to different graphs falls into one lane a graph; sizes with
    no graph belong to no lane.

    Raises:
        GuardError: when a range falls apart and `on_guard` is "error".
    """
    plan = Plan.from_config(config)
    sizes_of: dict[int, list[int]] = {index: [] for index in range(1, len(plan.entries) + 1)}
    for size, index in enumerate(plan.table):
        if index != NOT_SERVED:
            sizes_of[index].append(size)
    lanes = []
    for index, entry in enumerate(plan.entries, 1):
        by_graph: dict[int, list[int]] = {}
        for size in sizes_of[index]:
            by_graph.setdefault(owner[size], []).append(size)
        if len(by_graph) > 1 and config.on_guard == "error":
            at = next(size for size in sizes_of[index][1:] if size in boundaries)
            raise GuardError(
                f"one graph cannot serve {entry.range}: {boundaries[at]}. Put a split point at "
                f"{at - 1}, or set on_guard='split'"
            )
        for graph, sizes in sorted(by_graph.items()):
            if graph == 0:
                continue  # refused by the model, which the plan's notes say
            if len(by_graph) > 1 or not _has_one_owner(entry.range, owner):
                planned = _part_of(config, entry, sizes, boundaries)
            else:
                planned = entry
            lanes.append(Lane(planned, graphs[graph - 1], sizes))
    return lanes


def _has_one_owner(range_: Range, owner: array[int]) -> bool:
    """Whether all sizes of a range, shadowed ones included, have the same owner."""
    part = owner[range_.start : range_.end + 1]
    return all(value == part[0] for value in part)


def _part_of(
    config: Config, entry: PlannedRange, sizes: list[int], boundaries: dict[int, str]
) -> PlannedRange:
    """The line for those sizes of a range that one graph serves."""
    edges = [
        boundaries[s] for s in range(entry.range.start, entry.range.end + 2) if s in boundaries
    ]
    note = f"part of {entry.range}" + (f": the model asks {edges[0]}" if edges else "")
    parts = runs(sizes)
    range_ = Range(sizes[0], sizes[-1])
    made = config.planned(range_, parts if len(parts) > 1 else (), note)
    if made.hint not in sizes:
        made = replace(made, hint=min(sizes, key=lambda size: abs(size - made.hint)))
    return made


def _not_served(size: int, *args: Any) -> Any:
    raise AssertionError(f"size {size} was dispatched although no lane serves it")
