"""Blocks and whose they are: random uses beside a plain model of what each sequence holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitpoint.errors import CacheFull
from splitpoint.runtime.paged_cache import BLOCK_TOKENS, CachedSequence, PagedCache


def cache(tokens: int = 6 * BLOCK_TOKENS, sequences: int = 4) -> PagedCache:
    return PagedCache(1, 1, 8, torch.float32, tokens, sequences)


def append(pool: PagedCache, sequence: CachedSequence, values: list[float]) -> None:
    """What the operator does with a step of one sequence."""
    held = sequence.length
    pool.tell([len(values)], *pool.extend([sequence], [len(values)]))
    count, first, last, before, row = pool.steps[:5].tolist()
    assert (count, first, last, before, row) == (1, 0, len(values), held, sequence.row)
    for i, value in enumerate(values):
        block = pool.tables[row, (held + i) // BLOCK_TOKENS]
        pool.blocks[:, :, block, :, (held + i) % BLOCK_TOKENS] = value


def held(pool: PagedCache, sequence: CachedSequence) -> list[float]:
    places = range(sequence.length)
    blocks = [int(pool.tables[sequence.row, i // BLOCK_TOKENS]) for i in places]
    assert blocks == [sequence.blocks[i // BLOCK_TOKENS] for i in places]
    return [float(pool.blocks[0, 0, b, 0, i % BLOCK_TOKENS, 0]) for i, b in enumerate(blocks)]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "append", "fork", "crop", "close"]),
        st.integers(0, 3),
        st.integers(0, 2 * BLOCK_TOKENS),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS)
def test_each_sequence_holds_what_was_put_into_it(
    actions: list[tuple[str, int, int]],
) -> None:
    pool = cache()
    expected: list[tuple[CachedSequence, list[float]]] = []
    counter = 0.0
    for action, which, count in actions:
        try:
            if action == "open":
                expected.append((pool.open(), []))
                continue
            if not expected:
                continue
            sequence, values = expected[which % len(expected)]
            if action == "append":
                new = [counter + i for i in range(count)]
                counter += count
                if count:
                    append(pool, sequence, new)
                    values += new
            elif action == "fork":
                expected.append((pool.fork(sequence), list(values)))
            elif action == "crop":
                pool.crop(sequence, count)
                del values[count:]
            else:
                pool.close(sequence)
                expected = [each for each in expected if each[0] is not sequence]
        except CacheFull:
            pass
        for sequence, values in expected:
            assert held(pool, sequence) == values
        used = {block for sequence, _ in expected for block in sequence.blocks}
        assert pool.free_tokens == pool.capacity - len(used) * BLOCK_TOKENS
    for sequence, _ in expected:
        pool.close(sequence)
    assert pool.free_tokens == pool.capacity


def test_what_does_not_fit_changes_nothing() -> None:
    pool = cache(2 * BLOCK_TOKENS, 2)
    first, second = pool.open(), pool.open()
    append(pool, first, [1.0] * BLOCK_TOKENS)
    with pytest.raises(CacheFull, match=f"a cache of {2 * BLOCK_TOKENS} tokens"):
        pool.extend([first, second], [1, 1])
    assert (first.length, second.length) == (BLOCK_TOKENS, 0)
    with pytest.raises(CacheFull, match="as many as it may"):
        pool.open()
