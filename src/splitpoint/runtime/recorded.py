"""Sizes whose kernels are recorded on the device once and replayed: CUDA graphs, where there are.

A replay launches what was recorded, over the memory of then. So here the arguments are copied into
memory of the recorder's, results are copied out of what a replay writes, weights are seen to lie
where they did, and a function whose effect is more than its results is not recorded.
"""

from __future__ import annotations

import functools
import logging
import statistics
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..capture.leaves import TensorLeaf
from ..capture.module_state import Held
from ..capture.signature import Signature
from ..config import Config
from ..errors import InvalidDynamicDims
from ..graph.stitch import Stitched, rebind
from ..kernels.device_graphs import GraphDevice, Replay
from ..kernels.devices import device_row
from ..torch_internals.containers import tree_flatten, tree_unflatten
from ..torch_internals.tensors import memory_of
from .tried_values import is_close, is_same, poison, repeated, something_else

if TYPE_CHECKING:
    from .lanes import Lane

log = logging.getLogger("splitpoint")

TURNS = 9
"""Times that a call and a replay are timed, taking turns."""

WARM_UPS = 3
"""Calls before one is recorded: kernels are chosen at the first, and their code loaded."""


class Unrecordable(Exception):
    """A size that cannot be recorded, or padded; says why."""


@dataclass(eq=False)
class RecordedLane:
    """What serves a range of which some sizes are recorded; called as a stitched function."""

    recorder: Recorder
    lane: Lane
    run: Stitched
    """All that a call does."""
    check: Stitched
    """What a call checks of the module."""
    bare: Stitched
    """All that it does but for that."""
    sees_memory: bool
    """Whether `check` sees that a tensor of the module was given other memory."""
    bound: Sequence[Tensor] = ()
    is_stale: bool = False
    """Whether weights lie elsewhere than when its sizes were recorded."""
    _places: tuple[tuple[int, int], ...] = ()

    def __call__(self, size: int, *tensors: Tensor) -> Any:
        """The result for a size: of a replay, where it is recorded or is padded to one that is."""
        target = self.recorder.target(self, size)
        if target is None:
            return self.run(size, *tensors)
        return self.recorder.serve(self, target, size, tensors)

    def rebind(
        self,
        bound: Sequence[Tensor],
        held: Sequence[Held] | None,
        packed: Mapping[tuple[int, str], Any],
    ) -> None:
        """Read other tensors of the module from now on."""
        rebind(self.check, bound, held, packed)
        rebind(self.bare, bound, held, packed)
        self.bound = bound
        self.look()

    def look(self) -> None:
        """See whether weights lie elsewhere."""
        # What was recorded is dropped by the next call, which holds the recorder's lock.
        places = tuple((id(tensor), tensor.data_ptr()) for tensor in self.bound)
        self.is_stale |= places != self._places
        self._places = places


@dataclass(eq=False)
class Recording:
    """One recorded size."""

    size: int
    inputs: Sequence[Tensor]
    """Where the arguments of a call are copied to."""
    dims: Sequence[Sequence[int]]
    """The dynamic dimensions of each."""
    replay: Replay
    leaves: Sequence[Any]
    """Of the result; tensors are written anew by each replay."""
    spec: Any
    arguments: Mapping[int, int]
    """Which leaves are arguments, as they are."""
    kept: frozenset[int]
    """Which leaves are tensors that the module holds, as they are."""
    crops: Sequence[Sequence[int]] | None = None
    """For each leaf the dimensions that are as long as the size; None where smaller sizes may not
    be padded."""

    def call(self, size: int, tensors: Sequence[Tensor]) -> Any:
        """The result for arguments of this size or, where they may be padded, of a smaller one.
        What lies behind those is what calls before had there."""
        for memory, tensor, dims in zip(self.inputs, tensors, self.dims, strict=True):
            cropped(memory, dims, size).copy_(tensor)
        self.replay()
        copies: dict[int, Tensor] = {}
        leaves = []
        for index, leaf in enumerate(self.leaves):
            if index in self.arguments:
                leaves.append(tensors[self.arguments[index]])
            elif index in self.kept or not isinstance(leaf, Tensor):
                leaves.append(leaf)
            else:
                crop = self.crops[index] if self.crops is not None else ()
                if id(leaf) not in copies:
                    copies[id(leaf)] = cropped(leaf, crop, size).clone()
                leaves.append(copies[id(leaf)])
        return tree_unflatten(leaves, self.spec)


def cropped(tensor: Tensor, dims: Sequence[int], size: int) -> Tensor:
    """The first `size` along some dimensions."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, size)
    return tensor


@dataclass(eq=False)
class Recorder:
    """The recorded sizes of the calls of one kind.

    All that can be are recorded when the first of them is called, largest first, so that smaller
    ones find room in what larger ones need of the pool.
    """

    device: GraphDevice
    arguments: Sequence[TensorLeaf]
    sizes: Sequence[int]
    """Those to record, ascending."""
    asked: frozenset[int] = frozenset()
    """Those that stay recorded where a replay takes longer than a call, since they were named."""
    pads: bool = False
    """Whether other sizes are served by the next recorded one where that is right."""
    lanes: list[RecordedLane] = field(default_factory=list)
    owners: dict[int, RecordedLane] = field(default_factory=dict)
    """By recorded size: the lane that it belongs to, once it is compiled."""
    recordings: dict[int, Recording] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    """Sizes that cannot be recorded, and why."""
    unpadded: dict[int, str] = field(default_factory=dict)
    """Recorded sizes that smaller ones are not padded to, and why."""
    replays: int = 0
    _pool: Any = None
    _last: Any = None
    _memory: list[Tensor] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while arguments are copied in, replayed and copied out."""

    def add(self, lane: RecordedLane) -> None:
        """Take a lane that was compiled."""
        self.lanes.append(lane)
        self.owners |= dict.fromkeys(set(self.sizes).intersection(lane.lane.sizes), lane)

    # --- calls -------------------------------------------------------------------------

    def target(self, lane: RecordedLane, size: int) -> int | None:
        """The recorded size that is to serve a size; None where none is."""
        at = bisect_left(self.sizes, size)
        if at == len(self.sizes):
            return None
        found = self.sizes[at]
        if found in self.refused or found not in self.owners:
            return None
        if found == size:
            return size
        if not self.pads or found in self.unpadded:
            return None
        return found if self.owners[found].lane.graph is lane.lane.graph else None

    def serve(self, lane: RecordedLane, target: int, size: int, tensors: Sequence[Tensor]) -> Any:
        """A call by the recording of a size; by the lane itself, where it turns out that there can
        be none."""
        with self._lock:
            owner = self.owners[target]
            owner.check(target, *tensors)
            if not owner.sees_memory:
                owner.look()
            if owner.is_stale:
                self._forget(owner)
            # Whatever the last call left to do, on another stream perhaps, comes first.
            self._last = self.device.follow(self._last)
            if target not in self.recordings:
                self.record(size, tensors)
            recording = self.recordings.get(target)
            if recording is not None and (size == target or recording.crops is not None):
                self.replays += 1
                return recording.call(size, tensors)
        return lane.run(size, *tensors)

    def _forget(self, lane: RecordedLane) -> None:
        """Drop what was recorded of a lane, which is then recorded anew."""
        for size, owner in self.owners.items():
            if owner is lane:
                self.recordings.pop(size, None)
        lane.is_stale = False

    # --- recording ---------------------------------------------------------------------

    def record(self, size: int, tensors: Sequence[Tensor]) -> None:
        """Record all sizes that have a lane and no recording, after the arguments of a call."""
        for known in self.lanes:
            if known.is_stale:
                self._forget(known)
        if not self.recordings:
            self._pool = self.device.new_pool()
        with torch.inference_mode(False), torch.no_grad():
            for each in sorted(self.sizes, reverse=True):
                lane = self.owners.get(each)
                if lane is None or each in self.recordings or each in self.refused:
                    continue
                try:
                    made = self._recorded(lane, each, size, tensors)
                    if each not in self.asked:
                        self._refuse_slower(lane, made)
                    self.recordings[each] = made
                except Unrecordable as why:
                    self.refused[each] = str(why)
                    log.warning("size %d is not recorded: %s", each, self.refused[each])
            if self.pads:
                self._find_crops(size, tensors)

    def _recorded(
        self, lane: RecordedLane, size: int, given: int, tensors: Sequence[Tensor]
    ) -> Recording:
        if lane.lane.body is not None and lane.lane.body.updates is not None:
            raise Unrecordable("the model updates in place what it is given, or has")
        inputs = self._inputs(size)
        dims = [leaf.dims for leaf in self.arguments]
        for memory, tensor, along in zip(inputs, tensors, dims, strict=True):
            memory.copy_(repeated(tensor, along, given, size))
        run = functools.partial(lane.bare, size, *inputs)
        for _ in range(WARM_UPS):
            self.device.warm_up(run)
        expected = run()
        try:
            replay, result = self.device.record(run, self._pool)
        except RuntimeError as why:
            raise Unrecordable(_first_line(why)) from why
        leaves, spec = tree_flatten(result)
        arguments, kept = _as_they_are(leaves, inputs, lane.bound)
        recording = Recording(size, inputs, dims, replay, leaves, spec, arguments, kept)
        wanted, wanted_spec = tree_flatten(expected)
        if spec != wanted_spec:
            raise Unrecordable("it returns something else at each call")
        for index, (leaf, want) in enumerate(zip(leaves, wanted, strict=True)):
            if isinstance(leaf, Tensor) and index not in arguments and index not in kept:
                if memory_of(leaf) == memory_of(want):
                    raise Unrecordable("the model returns a tensor that it does not compute")
                poison(leaf)  # so that one that a replay does not write is seen
        replay()
        if not all(map(is_close, leaves, wanted)):
            raise Unrecordable("a replay computes something else")
        return recording

    def _refuse_slower(self, lane: RecordedLane, recording: Recording) -> None:
        """Compare a call with a replay, the copies around it included.

        Raises:
            Unrecordable: where the replay is not faster.
        """
        size, inputs = recording.size, recording.inputs
        tensors = [each.clone() for each in inputs]
        call = functools.partial(lane.bare, size, *inputs)
        replay = functools.partial(recording.call, size, tensors)
        times = [(self.device.seconds(call), self.device.seconds(replay)) for _ in range(TURNS)]
        called, replayed = (statistics.median(each) for each in zip(*times, strict=True))
        if replayed >= called:
            raise Unrecordable(
                f"a replay takes {replayed * 1e6:.0f} us and a call {called * 1e6:.0f}"
            )

    def _inputs(self, size: int) -> list[Tensor]:
        """Memory for the arguments of a size, laid out as they are; all sizes share it."""
        if not self._memory:
            self._memory = [
                torch.empty(
                    max(_extent(leaf, each) for each in self.sizes),
                    dtype=leaf.dtype,
                    device=leaf.device,
                )
                for leaf in self.arguments
            ]
            for memory in self._memory:  # what smaller sizes are padded with
                memory.zero_()
        return [
            memory.as_strided(shape := leaf.shape_at([size]), leaf.strides_for(shape))
            for memory, leaf in zip(self._memory, self.arguments, strict=True)
        ]

    # --- padding -----------------------------------------------------------------------

    def _find_crops(self, given: int, tensors: Sequence[Tensor]) -> None:
        """See which recordings are right for smaller sizes too."""
        before = 0
        for size in self.sizes:
            recording = self.recordings.get(size)
            if recording is not None and recording.crops is None and size not in self.unpadded:
                smaller = sorted({before + 1, (before + size) // 2, size - 1})
                smaller = [each for each in smaller if before < each < size]
                try:
                    recording.crops = self._crops(recording, smaller, given, tensors)
                except Unrecordable as why:
                    self.unpadded[size] = str(why)
                    log.warning("no size is padded to %d: %s", size, why)
            before = size

    def _crops(
        self, recording: Recording, smaller: Sequence[int], given: int, tensors: Sequence[Tensor]
    ) -> Sequence[Sequence[int]] | None:
        found: list[tuple[int, ...]] | None = None
        graph = self.owners[recording.size].lane.graph
        for size in smaller:
            lane = next((each for each in self.lanes if size in each.lane.sizes), None)
            if lane is None or lane.lane.graph is not graph:
                continue
            dims = recording.dims
            pairs = zip(tensors, dims, strict=True)
            call = [repeated(tensor, along, given, size) for tensor, along in pairs]
            expected, _ = tree_flatten(lane.bare(size, *call))
            dims_of = [
                _grown(leaf, want, recording.size, size)
                for leaf, want in zip(recording.leaves, expected, strict=True)
            ]
            if found is not None and dims_of != found:
                raise Unrecordable("its results grow with the size in more ways than one")
            found = dims_of
            # Whatever lies behind the rows of a call must not change their results by one bit,
            # and these must be those of the size itself.
            first = self._padded(recording, call, size, found, lambda rest: rest)
            other = self._padded(recording, call, size, found, something_else)
            if not all(map(is_same, first, other)):
                raise Unrecordable("a row's result depends on other rows")
            if not all(map(is_close, first, expected)):
                raise Unrecordable("results depend on how many rows there are")
        return found

    def _padded(
        self,
        recording: Recording,
        call: Sequence[Tensor],
        size: int,
        crops: Sequence[Sequence[int]],
        change: Callable[[Tensor], Tensor],
    ) -> list[Any]:
        """The leaves for a call that is padded, with something changed in all that pads it."""
        for memory, tensor, along in zip(recording.inputs, call, recording.dims, strict=True):
            memory.copy_(change(repeated(tensor, along, size, recording.size)))
            cropped(memory, along, size).copy_(tensor)
        recording.replay()
        return [
            cropped(leaf, crop, size).clone() if isinstance(leaf, Tensor) else leaf
            for leaf, crop in zip(recording.leaves, crops, strict=True)
        ]

    # --- for the user ------------------------------------------------------------------

    def recorded(self, lane: Lane) -> tuple[int, ...]:
        """The sizes of a lane that are recorded."""
        return tuple(size for size in sorted(self.recordings) if size in lane.sizes)

    def notes(self) -> list[str]:
        """What a plan says of it."""
        notes = []
        for size, why in sorted(self.refused.items()):
            notes.append(f"size {size} is not recorded: {why}")
        padded = [n for n, each in sorted(self.recordings.items()) if each.crops is not None]
        if padded:
            notes.append(f"other sizes are padded to the next of {', '.join(map(str, padded))}")
        for size, why in sorted(self.unpadded.items()):
            notes.append(f"no size is padded to {size}: {why}")
        return notes


def recorder_for(config: Config, signature: Signature | None) -> Recorder | None:
    """What records for calls of a signature; None where their device cannot, or nothing is asked
    for.

    Raises:
        InvalidDynamicDims: where sizes are asked for and several dimensions change.
    """
    if signature is None or not signature.tensors:
        return None
    device = signature.tensors[0].device
    graphs = device_row(device).graphs
    if graphs is None or not config.recorded_sizes:
        return None
    if not signature.dims.is_size_alone:
        if not config.cudagraph_capture_sizes:
            return None  # compile_sizes alone ask for no recording of lengths
        raise InvalidDynamicDims(
            f"cudagraph_capture_sizes is for one dynamic dimension, got "
            f"{', '.join(signature.dims.names)}: leave it out"
        )
    return Recorder(
        graphs(device),
        signature.tensors,
        config.recorded_sizes,
        frozenset(config.cudagraph_capture_sizes or ()),
        config.pad_to_captured,
    )


def _extent(leaf: TensorLeaf, size: int) -> int:
    """Elements from the first to the last of an argument, both included."""
    shape = leaf.shape_at([size])
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, leaf.strides_for(shape), strict=True))


def _as_they_are(
    leaves: Sequence[Any], inputs: Sequence[Tensor], bound: Sequence[Tensor]
) -> tuple[dict[int, int], frozenset[int]]:
    """Which leaves are arguments, and which are tensors of the module.

    Raises:
        Unrecordable: for leaves that are views of others, or of one of these.
    """
    index_of = {id(tensor): index for index, tensor in enumerate(inputs)}
    held = set(map(id, bound))
    taken = {memory_of(tensor) for tensor in (*inputs, *bound)}
    arguments: dict[int, int] = {}
    kept = set()
    seen: dict[Any, int] = {}
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if id(leaf) in index_of:
            arguments[index] = index_of[id(leaf)]
        elif id(leaf) in held:
            kept.add(index)
        elif (memory := memory_of(leaf)) in taken or seen.setdefault(memory, id(leaf)) != id(leaf):
            raise Unrecordable("the model returns a view of what it was given, has, or returns")
    return arguments, frozenset(kept)


def _grown(leaf: Any, smaller: Any, size: int, smaller_size: int) -> tuple[int, ...]:
    """The dimensions that are as long as the size.

    Raises:
        Unrecordable: for leaves of which one is not the beginning of the other.
    """
    if not isinstance(leaf, Tensor) or not isinstance(smaller, Tensor):
        if isinstance(leaf, Tensor) or isinstance(smaller, Tensor) or leaf != smaller:
            raise Unrecordable("it returns a value that follows from the size")
        return ()
    dims = []
    if leaf.dim() != smaller.dim() or leaf.dtype != smaller.dtype:
        raise Unrecordable("its results are of another kind at other sizes")
    for dim, (n, m) in enumerate(zip(leaf.shape, smaller.shape, strict=True)):
        if (n, m) == (size, smaller_size):
            dims.append(dim)
        elif n != m:
            raise Unrecordable(f"a result is {n} long at size {size} and {m} at {smaller_size}")
    return tuple(dims)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
