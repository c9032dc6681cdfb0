"""Derived copies of weights in the layouts that kernels read, kept equal to the weights."""

from __future__ import annotations

from operator import attrgetter

import torch

from ..kernels.memory import Streamed
from ..passes.linear import LAYOUTS
from .freed_weights import is_freed

_version = attrgetter("_version")
_pointer = torch.Tensor.data_ptr


class PackedWeights:
    """Packed copies, one for each (weight, layout), shared by ranges and graphs.

    A weight that is updated in place, or whose `.data` is exchanged, is packed anew into the
    same copy, so that whoever holds a copy goes on with it. A weight that was freed needs nothing
    until it is given data.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, str], torch.Tensor] = {}
        self._memory = Streamed()
        self._weights: dict[int, torch.Tensor] = {}
        """By id; held, so that ids stay theirs."""
        self._freed: list[torch.Tensor] = []
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._pointers: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(packed.nbytes for packed in self._copies.values())

    def get(self, weight: torch.Tensor, layout: str) -> torch.Tensor:
        """The copy of a [n, k] weight in a layout; made at first use."""
        copy = self._copies.get((id(weight), layout))
        return self._add(weight, layout) if copy is None else copy

    def _add(self, weight: torch.Tensor, layout: str) -> torch.Tensor:
        copy = self._memory.placed(_packed(weight, layout))
        self._copies[id(weight), layout] = copy
        if id(weight) not in self._weights:
            self._weights[id(weight)] = weight
            self._take(weight)
        return copy

    def packed_ids(self) -> set[int]:
        """The ids of the weights that have copies."""
        return set(self._weights)

    def fresh(self) -> bool:
        """Whether no packed weight was updated since it was packed."""
        return (
            list(map(_version, self._tensors)) == self._versions
            and list(map(_pointer, self._tensors)) == self._pointers
            and all(map(is_freed, self._freed))
        )

    def repack(self) -> None:
        """Pack anew what was updated.

        Raises:
            WeightsFreed: when somebody else freed a weight.
        """
        marks = zip(self._versions, self._pointers, strict=True)
        changed = [
            weight
            for weight, mark in zip(self._tensors, marks, strict=True)
            if (weight._version, weight.data_ptr()) != mark
        ]
        for weight in [*changed, *(each for each in self._freed if not is_freed(each))]:
            for layout in LAYOUTS:
                if (copy := self._copies.get((id(weight), layout))) is not None:
                    copy.copy_(_packed(weight, layout))
        self.note()

    def retain(self, weights: list[torch.Tensor]) -> None:
        """Drop the copies of weights that are not among these."""
        kept = set(map(id, weights))
        self._copies = {key: copy for key, copy in self._copies.items() if key[0] in kept}
        self._weights = {key: weight for key, weight in self._weights.items() if key in kept}
        self.note()

    def note(self) -> None:
        """Take the weights as they are: what the copies are equal to."""
        self._freed, self._tensors, self._versions, self._pointers = [], [], [], []
        for weight in self._weights.values():
            self._take(weight)

    def _take(self, weight: torch.Tensor) -> None:
        if is_freed(weight):
            self._freed.append(weight)
        else:
            self._tensors.append(weight)
            self._versions.append(weight._version)
            self._pointers.append(weight.data_ptr())


def _packed(weight: torch.Tensor, layout: str) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return LAYOUTS[layout].pack(weight.detach().contiguous())
