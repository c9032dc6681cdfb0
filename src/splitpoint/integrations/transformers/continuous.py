"""Continuous batching: transformers schedules, the paged cache holds the keys and values.

transformers numbers the places of its own cache and says at each step where each sequence's tokens
are read and written. A run of `BLOCK_TOKENS` places stands for one block here, which is taken when
it is first written; transformers' own memory is never touched.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UnsupportedModel
from ...runtime.paged_cache import BLOCK_TOKENS, CachedSequence, PagedCache

TOLD = ("cache", "read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k")
"""What a forward is told of a step."""

IGNORED = {
    *TOLD,
    *("max_length_q", "max_length_k", "block_table", "is_causal", "logits_indices"),
    *("logits_processor_args", "attention_mask"),
}
"""What it is told besides, and follows from that."""


def is_step(given: Mapping[str, Any]) -> bool:
    """Whether a call is one of continuous batching."""
    return all(given.get(name) is not None for name in TOLD)


class _Refused:
    """In place of what transformers moves to other memory when its cache is full."""

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModel(
            "cpu_offload_space moves parts of transformers' own cache, which a compiled model does "
            "not use: leave it at 0"
        )


class Places:
    """The blocks that stand for the places of one of transformers' paged caches.

    Raises:
        UnsupportedModel: for a cache that is not as transformers 5.23 makes it, or that has several
            kinds of layers.
    """

    def __init__(self, pool: PagedCache, theirs: Any) -> None:
        self.pool = pool
        self.blocks: dict[int, int] = {}
        """By the first place of a run, over BLOCK_TOKENS."""
        self.rows: list[CachedSequence] = []
        allocators = getattr(theirs, "cache_allocators", None)
        if not isinstance(allocators, dict) or list(allocators) != ["full_attention"]:
            raise UnsupportedModel(
                "continuous batching over the paged cache is for models whose layers all attend to "
                "everything: leave this model to transformers"
            )
        (allocator,) = allocators.values()
        page = getattr(allocator, "tokens_per_page", 0)
        if not page or page % BLOCK_TOKENS or not hasattr(allocator, "_copy_view"):
            raise UnsupportedModel(
                f"transformers' cache has pages of {page} tokens, expected a multiple of "
                f"{BLOCK_TOKENS}: leave this model to transformers"
            )
        allocator.copy_blocks = self._copier(
            allocator.block_physical_stride, allocator.tokens_per_block
        )
        allocator._copy_view = _Refused()
        weakref.finalize(theirs, _give_back, pool, self.blocks, self.rows)

    def _copier(self, stride: int, length: int) -> Callable[[Sequence[int], Sequence[int]], None]:
        blocks, pool = self.blocks, self.pool

        def copy_blocks(sources: Sequence[int], targets: Sequence[int]) -> None:
            with pool.lock:
                for source, target in zip(list(sources), list(targets), strict=True):
                    for place in range(0, length, BLOCK_TOKENS):
                        old = blocks.get((int(source) * stride + place) // BLOCK_TOKENS)
                        if old is not None:
                            at = (int(target) * stride + place) // BLOCK_TOKENS
                            new = blocks.get(at)
                            if new is None:
                                new = blocks[at] = pool.take()
                            pool.blocks[:, :, new] = pool.blocks[:, :, old]

        return copy_blocks

    def begin(self, given: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
        """Make room for a step; of each sequence the new tokens, those held, and its row.

        Raises:
            CacheFull: when there is no room for its new tokens.
        """
        read, write = given["read_index"][0], given["write_index"][0]
        starts = given["cu_seq_lens_q"].tolist()
        ends = given["cu_seq_lens_k"]["full_attention"].tolist()
        counts = [last - first for first, last in itertools.pairwise(starts)]
        whole = [last - first for first, last in itertools.pairwise(ends)]
        held = [total - count for total, count in zip(whole, counts, strict=True)]
        while len(self.rows) < len(counts):
            self.rows.append(self.pool.open())
        for index, (before, count) in enumerate(zip(held, counts, strict=True)):
            first = -before % BLOCK_TOKENS  # of the new tokens, the first that begins a block
            new = write[starts[index] + first : starts[index] + count : BLOCK_TOKENS]
            places = new.tolist()
            if before:
                old = read[ends[index] : ends[index] + before : BLOCK_TOKENS]
                places = old.tolist() + places
            self.pool.set_row(self.rows[index].row, [self._block(place) for place in places])
        return counts, held, [each.row for each in self.rows[: len(counts)]]

    def _block(self, place: int) -> int:
        number = place // BLOCK_TOKENS
        found = self.blocks.get(number)
        if found is None:
            found = self.blocks[number] = self.pool.take()
        return found


def _give_back(pool: PagedCache, blocks: dict[int, int], rows: list[CachedSequence]) -> None:
    with pool.lock:
        for block in blocks.values():
            pool.give_back(block)
        for row in rows:
            pool.close(row)
    blocks.clear()
    rows.clear()
