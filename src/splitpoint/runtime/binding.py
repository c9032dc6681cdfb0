"""The functions of a program over the module's tensors: bound, packed, freed, and kept up with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from ..config import Config
from ..errors import StateChanged, WeightsFreed
from ..graph.overlap import Apart
from ..graph.stitch import Body, Guard, Packed, Stitched, assemble, rebind
from ..store.store import Store
from .freed_weights import (
    Originals,
    convert_whole_only,
    is_freed,
    plain_reads,
    reads_unchecked,
    unread,
)
from .lanes import Graph, Lane
from .native import native
from .packed_weights import PackedWeights
from .recorded import RecordedLane, Recorder

log = logging.getLogger("splitpoint")


class Binding:
    """Binds what lanes run to the tensors that the module holds, and follows their changes.

    Args:
        config: the program's.
        lanes: the program's, which are added to and taken from while it lives.
        store: where packed copies of weights are files, if so configured.
    """

    def __init__(
        self, config: Config, lanes: Sequence[Lane | None], store: Store | None = None
    ) -> None:
        self.config = config
        self.lanes = lanes
        self.weights = PackedWeights(store if config.mmap_packed_weights else None)
        self.lock = threading.RLock()
        """Held while functions are made and bound, and weights packed and freed."""
        self.originals = Originals(self.lock)
        self._frees = False
        """Whether original weights are freed when the module changes."""

    def graphs(self) -> list[Graph]:
        """The graphs of all lanes."""
        return list({id(lane.graph): lane.graph for lane in self.lanes if lane}.values())

    def look_past_freed(self, graph: Graph) -> None:
        """Have the checks of a graph see freed weights as they were, if any may be freed."""
        if self.config.free_original_weights:
            graph.state = graph.state.around(self.originals.around)

    def stitch(
        self, lane: Lane, body: Body, proven: bool, recorder: Recorder | None = None
    ) -> Stitched:
        """The function of a lane, bound; with a recorder, `lane.recorded` is made too. `proven`:
        the module was just found to be as captured."""
        graph = lane.graph
        guard = None
        if not proven:  # the module may hold other tensors than at capture
            self.refresh(graph)
        if self.config.module_guards == "every_call":
            guard = self.guard(graph)
        lane.body = body
        lane.packed = body.packed
        unwatched = graph.state.watch is None
        repack = Packed(self.weights.fresh, self.repack) if unwatched else None
        runs_natively = self.config.runner == "native" and graph.row.native_runner
        runner = native(body) if runs_natively else None
        apart = None
        if body.updates is not None:
            apart = Apart(body.updates, graph.argument_names, graph.state.owner)
        run = assemble(body, guard, repack, runner, apart)
        if recorder is not None:
            checks = assemble(replace(body, lines=("return None",), steps=(None,)), guard, repack)
            watched = guard is not None and not unwatched
            lane.recorded = RecordedLane(recorder, lane, run, checks, assemble(body, None), watched)
            recorder.add(lane.recorded)
        self._rebind(run, lane)
        if not proven:
            self._renew_watch(graph)
        return run

    def pack(self, lanes: Iterable[Lane | None]) -> None:
        """Pack all weights that what lanes run reads in copies."""
        found = [lane for lane in lanes if lane is not None]
        # In one order wherever the lanes come from: a file holds the copies of many.
        found.sort(key=lambda lane: (lane.planned.range, lane.planned.lengths, *lane.sizes[:1]))
        with self.lock:
            self.weights.add(
                (lane.graph.bound[index], layout)
                for lane in found
                if lane.body is not None
                for index, layout in lane.body.packed
            )

    def guard(self, graph: Graph) -> Guard:
        """What a function of the graph checks of the module at each call."""
        others = [each.state for each in self.graphs()]
        checks, held = graph.state.checks(self.weights.packed_ids(), others)
        return Guard(checks, lambda: self.refresh(graph), held)

    def _rebind(self, run: Stitched, lane: Lane) -> None:
        state = lane.graph.state
        packed = {
            (index, layout): self.weights.get(state.bound[index], layout)
            for index, layout in lane.packed
        }
        if self.config.module_guards == "first_call" and lane.body is not None:
            reads_unchecked(self, [state.bound[index] for index in plain_reads(lane.body)])
        # Where there is a watch, the function looks at none of the facts.
        held = state.held if state.watch is None else ()
        rebind(run, state.bound, held, packed)
        if lane.recorded is not None:
            lane.recorded.rebind(state.bound, held, packed)

    def refresh(self, graph: Graph) -> None:
        """Bind the tensors that the module holds now in every function of the graph.

        Raises:
            StateChanged: when more changed than which tensors the module holds.
        """
        self._check(graph)
        with self.lock:
            graph.state.bind()
            self.weights.repack()
            self.weights.retain([tensor for each in self.graphs() for tensor in each.bound])
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
        with self.lock:
            self._frees = True
            self._free()
            for graph in self.graphs():
                self._renew_watch(graph)
        log.info("freed %.1f MiB of original weights", self.originals.nbytes / 2**20)

    def _free(self) -> None:
        runs_: list[tuple[Body, Sequence[torch.Tensor]]] = []
        others: list[torch.Tensor] = []
        for lane in self.lanes:
            if lane is not None:
                assert lane.body is not None
                runs_.append((lane.body, lane.graph.bound))
        owners = [owner for graph in self.graphs() if (owner := graph.state.owner) is not None]
        for owner in owners:
            others += [*owner.parameters(), *owner.buffers()]
        bound = [each for _, bound in runs_ for each in bound]
        self.weights.forget()
        try:
            self.originals.free(unread(runs_, others), bound, self)
        finally:
            self.weights.note()
        for owner in owners:
            convert_whole_only(owner)

    def _renew_watch(self, graph: Graph) -> None:
        graph.state.renew(self.weights.packed_ids())

    def repack(self, whole: bool = False) -> None:
        """Bring packed copies of weights that were updated in place up to date; all with `whole`,
        also of weights that do not look updated."""
        with self.lock:
            self.weights.repack(whole)
            if self._frees:
                self._free()

    def _check(self, graph: Graph) -> None:
        with torch.no_grad():  # as it was at capture, and is around every call
            unchanged = graph.state.check()
        if not unchanged:
            if any(is_freed(each) and not self.originals.owns(each) for each in graph.bound):
                raise WeightsFreed(
                    "another compiled model freed weights of this module "
                    "(free_original_weights=True): load them anew (load_state_dict), or compile "
                    "that one with free_original_weights=False"
                )
            raise StateChanged(
                f"the module, or something global that it reads, is not as it was when it was "
                f"captured: {graph.state.explain()}\n"
                f"change it back, or have it captured and compiled anew: call reset() of the "
                f"compiled model (undo() and compile() of integrations.transformers)"
            )
