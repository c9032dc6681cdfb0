"""Keys and values of many sequences in blocks of one tensor, as `cached_attention` reads them.

A sequence has a list of blocks, which grows as it does; sequences that begin alike share blocks
until one of them writes there. The idea is vLLM's PagedAttention (Kwon et al., 2023).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..errors import CacheFull

CACHED_ATTENTION = "splitpoint::cached_attention"
"""The operator that appends to a cache and reads it: where a model over one is split."""

BLOCK_TOKENS = 32
"""Tokens of a block: a head's keys of one lie in a row of some KiB."""


@dataclass(eq=False)
class CachedSequence:
    """A sequence whose keys and values are in the cache."""

    row: int
    """Of the tables."""
    length: int = 0
    """Tokens held."""
    blocks: list[int] = field(default_factory=list)


class PagedCache:
    """The memory of keys and values, and which blocks of it are whose.

    Memory is reserved at once and used as blocks are: the operating system gives it when it is
    first written to.

    Args:
        layers, kv_heads, size: of the model: attention layers, heads of keys, elements of one.
        dtype: of keys and values.
        tokens: how many it holds at most, in all sequences; rounded up to whole blocks.
        sequences: how many there may be at once.
    """

    def __init__(
        self, layers: int, kv_heads: int, size: int, dtype: torch.dtype, tokens: int, sequences: int
    ) -> None:
        count = -(-tokens // BLOCK_TOKENS)
        self.blocks = torch.empty(layers, 2, count, kv_heads, BLOCK_TOKENS, size, dtype=dtype)
        """[layers, 2, blocks, kv_heads, BLOCK_TOKENS, size]: keys, then values."""
        self.tables = torch.zeros(sequences, count, dtype=torch.int32)
        """The blocks of each sequence, by row."""
        self.steps = torch.zeros(3 * sequences + 2, dtype=torch.int32)
        """What the operator is told of the step at hand."""
        self.lock = threading.RLock()
        """Held from `tell` until the step has run."""
        self._free = list(reversed(range(count)))
        self._rows = list(reversed(range(sequences)))
        self._users = [0] * count

    @property
    def capacity(self) -> int:
        """Tokens that it holds at most."""
        return len(self._users) * BLOCK_TOKENS

    @property
    def free_tokens(self) -> int:
        """Tokens that there is room for, in new blocks."""
        return len(self._free) * BLOCK_TOKENS

    def open(self) -> CachedSequence:
        """A new sequence.

        Raises:
            CacheFull: when there are as many as there may be.
        """
        with self.lock:
            if not self._rows:
                raise CacheFull(
                    f"the cache has {self.tables.shape[0]} sequences, as many as it may: drop "
                    f"caches that are not needed, or raise max_sequences"
                )
            return CachedSequence(self._rows.pop())

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """Another sequence that begins with all that one holds.

        Raises:
            CacheFull: as `open`.
        """
        with self.lock:
            other = self.open()
            other.length, other.blocks = sequence.length, list(sequence.blocks)
            for block in other.blocks:
                self._users[block] += 1
            self.tables[other.row] = self.tables[sequence.row]
            return other

    def crop(self, sequence: CachedSequence, length: int) -> None:
        """Forget what a sequence holds beyond a length."""
        with self.lock:
            sequence.length = min(sequence.length, length)
            keep = -(-sequence.length // BLOCK_TOKENS)
            while len(sequence.blocks) > keep:
                self.give_back(sequence.blocks.pop())

    def close(self, sequence: CachedSequence) -> None:
        """Give back all that a sequence has; it must not be used again."""
        with self.lock:
            self.crop(sequence, 0)
            self._rows.append(sequence.row)

    def extend(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Make room for the next tokens of some sequences. What each holds counts up at once; one
        that fails is taken back with `crop`.

        Returns:
            What each held before, and its row, as `tell` takes them.

        Raises:
            CacheFull: when there is no room; nothing has changed then.
        """
        with self.lock:
            needed = sum(map(self._blocks_needed, sequences, tokens))
            if needed > len(self._free):
                held = sum(sequence.length for sequence in sequences)
                raise CacheFull(
                    f"{sum(tokens)} more tokens, beside {held} of the same sequences, do not fit "
                    f"into a cache of {self.capacity} tokens of which {self.free_tokens} are free: "
                    f"drop caches that are not needed, or raise max_cache_tokens"
                )
            before = [sequence.length for sequence in sequences]
            for sequence, count in zip(sequences, tokens, strict=True):
                self._extend(sequence, count)
                sequence.length += count
            return before, [sequence.row for sequence in sequences]

    def tell(self, tokens: Sequence[int], held: Sequence[int], rows: Sequence[int]) -> None:
        """Tell the operator of a step: of each sequence the new tokens, those held, and its row."""
        starts = [0]
        for count in tokens:
            starts.append(starts[-1] + count)
        told = torch.tensor([len(tokens), *starts, *held, *rows], dtype=torch.int32)
        self.steps[: len(told)] = told

    # --- for who keeps books of its own ------------------------------------------------

    def set_row(self, row: int, blocks: Sequence[int]) -> None:
        """Write a sequence's blocks into the tables."""
        self.tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def take(self) -> int:
        """A block that nobody has.

        Raises:
            CacheFull: when there is none.
        """
        if not self._free:
            raise CacheFull(
                f"the cache has {self.capacity} tokens, all of them in use: run fewer requests at "
                f"once, or raise max_cache_tokens"
            )
        block = self._free.pop()
        self._users[block] = 1
        return block

    def give_back(self, block: int) -> None:
        """Say that one of its users needs a block no more."""
        self._users[block] -= 1
        if not self._users[block]:
            self._free.append(block)

    # --- blocks of a sequence ----------------------------------------------------------

    def _is_shared_where_written(self, sequence: CachedSequence) -> bool:
        inside = sequence.length % BLOCK_TOKENS
        return bool(inside) and self._users[sequence.blocks[-1]] > 1

    def _blocks_needed(self, sequence: CachedSequence, tokens: int) -> int:
        new = -(-(sequence.length + tokens) // BLOCK_TOKENS) - len(sequence.blocks)
        return new + (tokens > 0 and self._is_shared_where_written(sequence))

    def _extend(self, sequence: CachedSequence, tokens: int) -> None:
        if tokens and self._is_shared_where_written(sequence):
            last = len(sequence.blocks) - 1
            old, new = sequence.blocks[last], self.take()
            self.blocks[:, :, new] = self.blocks[:, :, old]
            self.give_back(old)
            sequence.blocks[last] = new
            self.tables[sequence.row, last] = new
        have, need = len(sequence.blocks), -(-(sequence.length + tokens) // BLOCK_TOKENS)
        if need > have:
            sequence.blocks += [self.take() for _ in range(need - have)]
            self.tables[sequence.row, have:need] = torch.tensor(
                sequence.blocks[have:], dtype=torch.int32
            )
