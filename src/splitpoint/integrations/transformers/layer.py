"""What stands in a transformers cache for all its layers: sequences of the paged cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...errors import UnsupportedModel
from ...runtime.paged_cache import CachedSequence, PagedCache


def _close(pool: PagedCache, sequences: list[CachedSequence]) -> None:
    for sequence in sequences:
        pool.close(sequence)
    sequences.clear()


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The one layer of a cache that a compiled model filled.

    A cache counts columns of a padded batch; the sequences hold the tokens among them that are no
    padding.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, pool: PagedCache, batch_size: int) -> None:
        super().__init__()
        self.pool = pool
        self.sequences: list[CachedSequence] = []
        self.seen = 0
        """Columns so far."""
        self.kept: Tensor | None = None
        """[batch, columns]: which are tokens; None where all are."""
        weakref.finalize(self, _close, pool, self.sequences)
        self.sequences += [pool.open() for _ in range(batch_size)]
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.sequences)

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: as long as the pool has room."""
        return -1

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, which it was called in transformers 5.0."""
        return -1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns after a step of `query_length` tokens, and the first of them."""
        if isinstance(query_length, Tensor):  # a cache position, in transformers 5.0
            query_length = query_length.shape[0]
        return self.seen + query_length, 0

    def crop(self, tokens: int) -> None:
        """Forget the last `-tokens` columns, or all beyond `tokens` of them."""
        length = max(0, self.seen + tokens) if tokens <= 0 else min(tokens, self.seen)
        gone = [self.seen - length] * self.batch_size
        if self.kept is not None:
            gone = self.kept[:, length:].sum(1).tolist()
            self.kept = self.kept[:, :length]
        for sequence, count in zip(self.sequences, gone, strict=True):
            self.pool.crop(sequence, sequence.length - int(count))
        self.seen = length

    def reset(self) -> None:
        """Forget everything."""
        self.crop(-self.seen)

    def close(self) -> None:
        """Give the sequences back now, whoever still refers to this."""
        _close(self.pool, self.sequences)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._take(
            indices.nonzero().flatten().tolist()
            if indices.dtype is torch.bool
            else indices.tolist()
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._take([row for row in range(self.batch_size) for _ in range(repeats)])

    def _take(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(self.batch_size)):
            return
        before, used = list(self.sequences), set()
        for row in rows:
            self.sequences.append(self.pool.fork(before[row]) if row in used else before[row])
            used.add(row)
        del self.sequences[: len(before)]  # the list itself is what is closed in the end
        for row, sequence in enumerate(before):
            if row not in used:
                self.pool.close(sequence)
        if self.kept is not None:
            self.kept = self.kept[list(rows)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refused: the uncompiled model cannot go on with this cache.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel(
            "this cache was filled by a compiled model, and the model itself cannot go on with it: "
            "call the compiled one, without what it leaves to the model (labels, "
            "output_attentions, a mask that hides the last column)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        other = PagedLayer(self.pool, 0)
        other.sequences += [self.pool.fork(sequence) for sequence in self.sequences]
        other.seen, other.kept = self.seen, copy.deepcopy(self.kept)
        return other
