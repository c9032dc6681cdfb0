"""Derived copies of weights in the layouts that kernels read, kept equal to the weights."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch

from ..kernels.memory import Streamed
from ..passes.linear import LAYOUTS
from ..store.store import Store
from .freed_weights import is_freed
from .packed_files import PackedFiles, Wanted

_version = attrgetter("_version")
_pointer = torch.Tensor.data_ptr


class PackedWeights:
    """Packed copies, one for each (weight, layout), shared by ranges and graphs.

    A weight that is updated in place, or whose `.data` is exchanged, is packed anew into the
    same copy, so that whoever holds a copy goes on with it; the pages of a file that are written
    to are this process's own from then on. A weight that was freed needs nothing
    until it is given data. What torch does not count (updates of `weight.data`, of arrays that
    share its memory, of inference tensors) is not seen.

    Args:
        store: where `add` keeps copies as files that are mapped, or None to have them in memory of
            this process alone.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._files = None if store is None else PackedFiles(store, self._packed)
        self.packings = 0
        """How often a weight was packed."""
        self._copies: dict[tuple[int, str], torch.Tensor] = {}
        self._mapped: set[tuple[int, str]] = set()
        """Which copies are as their file has them."""
        self._memory = Streamed()
        self._weights: dict[int, torch.Tensor] = {}
        """By id; held, so that ids stay theirs."""
        self._freed: list[torch.Tensor] = []
        self._tensors: list[torch.Tensor] = []
        self._pointers: list[int] = []
        self._storages: list[torch.UntypedStorage] = []
        """Of `_tensors`, so that what takes their place lies elsewhere."""
        self._counting: list[torch.Tensor] = []
        """Those whose updates are counted."""
        self._versions: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(packed.nbytes for packed in self._copies.values())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the copies that are as their file has them."""
        return sum(self._copies[key].nbytes for key in self._mapped)

    def get(self, weight: torch.Tensor, layout: str) -> torch.Tensor:
        """The copy of a [n, k] weight in a layout; made at first use, not as a file."""
        if (id(weight), layout) not in self._copies:
            self._add([(weight, layout)], None)
        return self._copies[id(weight), layout]

    def add(self, wanted: Iterable[tuple[torch.Tensor, str]]) -> None:
        """Have copies of [n, k] weights in layouts, as files where that was asked for: the same
        ones together and in the same order, as files hold several."""
        missing = {
            (id(weight), layout): (weight, layout)
            for weight, layout in wanted
            if (id(weight), layout) not in self._copies
        }
        if missing:
            self._add(list(missing.values()), self._files)

    def _add(self, wanted: Wanted, files: PackedFiles | None) -> None:
        found = {} if files is None else files.copies(wanted)
        self._mapped |= set(found)
        for weight, layout in wanted:
            copy = found.get((id(weight), layout))
            if copy is None:
                copy = self._memory.placed(self._packed(weight, layout))
            self._copies[id(weight), layout] = copy
            if id(weight) not in self._weights:
                self._weights[id(weight)] = weight
                self._take(weight)

    def _packed(self, weight: torch.Tensor, layout: str) -> torch.Tensor:
        self.packings += 1
        with torch.inference_mode(False), torch.no_grad():
            return LAYOUTS[layout].pack(weight.detach().contiguous())

    def packed_ids(self) -> set[int]:
        """The ids of the weights that have copies."""
        return set(self._weights)

    def fresh(self) -> bool:
        """Whether no packed weight was updated since it was packed."""
        return (
            list(map(_version, self._counting)) == self._versions
            and list(map(_pointer, self._tensors)) == self._pointers
            and all(map(is_freed, self._freed))
        )

    def repack(self, whole: bool = False) -> None:
        """Pack anew what was updated, or all with `whole`.

        Raises:
            WeightsFreed: when somebody else freed a weight.
        """
        counted = zip(self._counting, self._versions, strict=True)
        placed = zip(self._tensors, self._pointers, strict=True)
        updated = {id(weight) for weight, version in counted if weight._version != version}
        updated |= {id(weight) for weight, place in placed if weight.data_ptr() != place}
        changed = [each for each in self._tensors if whole or id(each) in updated]
        for weight in [*changed, *(each for each in self._freed if not is_freed(each))]:
            for layout in LAYOUTS:
                if (copy := self._copies.get((id(weight), layout))) is not None:
                    copy.copy_(self._packed(weight, layout))
                    self._mapped.discard((id(weight), layout))
        self.note()

    def retain(self, weights: list[torch.Tensor]) -> None:
        """Drop the copies of weights that are not among these."""
        kept = set(map(id, weights))
        self._copies = {key: copy for key, copy in self._copies.items() if key[0] in kept}
        self._mapped &= self._copies.keys()
        self._weights = {key: weight for key, weight in self._weights.items() if key in kept}
        self.note()

    def note(self) -> None:
        """Take the weights as they are: what the copies are equal to."""
        self.forget()
        for weight in self._weights.values():
            self._take(weight)

    def forget(self) -> None:
        """Hold no memory of the weights, until `note`."""
        self._freed, self._tensors, self._pointers, self._storages = [], [], [], []
        self._counting, self._versions = [], []

    def _take(self, weight: torch.Tensor) -> None:
        if is_freed(weight):
            self._freed.append(weight)
            return
        self._tensors.append(weight)
        self._pointers.append(weight.data_ptr())
        self._storages.append(weight.untyped_storage())
        if not weight.is_inference():
            self._counting.append(weight)
            self._versions.append(weight._version)
