"""The operator against float64, on random steps of random sequences whose blocks lie anyhow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitpoint import kernels
from splitpoint.kernels.cached_attention import Expected, pack_steps

pytestmark = pytest.mark.usefixtures("poisoned")

OPS: Any = torch.ops.splitpoint

thorough = settings(
    max_examples=200,
    deadline=None,
    # The fixture sets what every example needs, once; examples undo nothing of it.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

DTYPES = (torch.bfloat16, torch.float32)


@dataclass
class Case:
    """Arguments of cached_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    cache: Tensor
    steps: Tensor
    tables: Tensor
    options: dict[str, Any]

    def arguments(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, self.cache, self.steps, self.tables)

    def run(self) -> Tensor:
        y: Tensor = OPS.cached_attention(*self.arguments(), **self.options)
        return y

    def expected(self) -> Expected:
        rounds = kernels.use_instruction_set("") in ("avx512_bf16", "amx")
        return Expected.of(*self.arguments(), **self.options, rounds_weights=rounds)

    def check(self, threads: int = 1) -> None:
        expected = self.expected()
        torch.set_num_threads(threads)
        y = self.run()
        torch.set_num_threads(1)
        assert y.is_contiguous()
        assert y.dtype == self.query.dtype
        assert expected.exceeded(y) <= 1
        assert same(self.cache, expected.cache)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are, those of NaN too."""
    kind = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    return torch.equal(one.view(kind), other.view(kind))


def make_case(
    tokens: list[int],
    held: list[int],
    heads: int,
    group: int,
    size: int,
    block_tokens: int,
    dtype: torch.dtype,
    *,
    padding: int = 0,
    layers: int = 1,
    layer: int = 0,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    rows_first: bool = False,
    gap: int = 0,
    seed: int = 0,
) -> Case:
    """Sequences in blocks in random order; all else in the cache is NaN, and so are padding
    tokens and what lies between queries, keys and values."""
    rng = torch.Generator().manual_seed(seed)
    count = len(tokens)
    needed = [-(-(t + h) // block_tokens) for t, h in zip(tokens, held, strict=True)]
    width = max([1, *needed]) + int(torch.randint(0, 3, (), generator=rng))
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=rng)
    rows = torch.randperm(count + 1, generator=rng)[:count].tolist()
    tables = torch.full((count + 1, width), -7, dtype=torch.int32)
    shape = (layers, 2, blocks, heads, block_tokens, size)
    cache = torch.full(shape, torch.nan, dtype=dtype)
    at = 0
    for row, own, length in zip(rows, needed, held, strict=True):
        mine = order[at : at + own]
        at += own
        tables[row, :own] = mine
        # What no query of the window sees may have been given up.
        seen = torch.arange(max(0, length - window + 1) // 16 * 16 if window else 0, length)
        shape = (len(seen), 2, heads, size)
        cache[layer][:, mine[seen // block_tokens], :, seen % block_tokens] = torch.randn(
            shape, generator=rng
        ).to(dtype)
    total = sum(tokens) + padding

    def given(heads: int) -> Tensor:
        outer = (total, heads) if rows_first else (heads, total)
        full = torch.full((1, *outer, size + gap), torch.nan, dtype=dtype)[..., :size]
        result = full.transpose(1, 2) if rows_first else full
        result[:, :, : sum(tokens)] = torch.randn(1, heads, sum(tokens), size, generator=rng).to(
            dtype
        )
        return result

    steps = pack_steps(
        tokens, held, rows, 3 * count + 2 + int(torch.randint(0, 4, (), generator=rng))
    )
    options = {
        "layer": layer,
        "scale": 1 / math.sqrt(size) if scale is None else scale,
        "window": window,
        "softcap": softcap,
    }
    return Case(given(heads * group), given(heads), given(heads), cache, steps, tables, options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(0, 4))
    length = st.one_of(st.integers(0, 40), st.integers(0, 300), st.sampled_from([511, 600]))
    part = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from([1, 100]))
    layers = draw(st.integers(1, 3))
    return make_case(
        [draw(part) for _ in range(count)],
        [draw(length) for _ in range(count)],
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([8, 16, 24, 40, 64, 72, 80, 96, 128, 256])),
        draw(st.sampled_from([16, 32, 48, 64, 128])),
        draw(st.sampled_from(DTYPES)),
        padding=draw(st.integers(0, 3)),
        layers=layers,
        layer=draw(st.integers(0, layers - 1)),
        scale=draw(st.sampled_from([None, 0.125, -0.3, 1.0])),
        window=draw(st.sampled_from([0, 0, 1, 5, 16, 100, 2**40])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
        rows_first=draw(st.booleans()),
        gap=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 2**16)),
    )


@thorough
@given(
    case=cases(),
    threads=st.sampled_from([1, 2]),
    instruction_set=st.sampled_from(kernels.instruction_sets()),
)
def test_matches_float64(case: Case, threads: int, instruction_set: str) -> None:
    kernels.use_instruction_set(instruction_set)
    case.check(threads)


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "held", "heads", "group", "size"),
    [
        ([1], [2000], 3, 3, 64),
        ([1] * 8, [100 * i for i in range(8)], 8, 4, 64),
        ([1, 300, 7], [600, 0, 30], 2, 4, 128),
        ([2, 1], [513, 1024], 1, 8, 96),
    ],
)
def test_matches_float64_at_shapes_of_models(
    instruction_set: str,
    dtype: torch.dtype,
    tokens: list[int],
    held: list[int],
    heads: int,
    group: int,
    size: int,
) -> None:
    kernels.use_instruction_set(instruction_set)
    for window, softcap in ((0, 0.0), (128, 0.0), (0, 50.0)):
        make_case(
            tokens, held, heads, group, size, 32, dtype, window=window, softcap=softcap
        ).check(threads=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_by_token_is_as_all_at_once(dtype: torch.dtype) -> None:
    """And as torch's own attention without a cache."""
    whole = make_case([70], [0], 2, 3, 64, 16, dtype)
    y = whole.run()
    steps = make_case([70], [0], 2, 3, 64, 16, dtype)
    each = []
    for i in range(70):
        part = replace(
            steps,
            query=steps.query[:, :, i : i + 1],
            key=steps.key[:, :, i : i + 1],
            value=steps.value[:, :, i : i + 1],
            steps=pack_steps([1], [i], [int(steps.steps[4])], 8),
        )
        each.append(part.run())
    assert same(steps.cache, whole.cache)
    loose = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.cat(each, 1), y, rtol=loose, atol=loose)
    plain = F.scaled_dot_product_attention(
        whole.query, whole.key, whole.value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(y, plain.transpose(1, 2), rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_change_nothing(dtype: torch.dtype) -> None:
    def case() -> Case:
        return make_case([1, 90, 1], [1500, 20, 300], 2, 4, 64, 32, dtype)

    torch.set_num_threads(1)
    alone = case().run()
    torch.set_num_threads(2)
    assert torch.equal(case().run(), alone)
    other = case()
    other.query[:, :, 1:91], other.value[:, :, 1:91] = 7, torch.nan
    y = other.run()
    assert torch.equal(y[:, :1], alone[:, :1])
    assert torch.equal(y[:, 91:], alone[:, 91:])


def test_scores_far_apart_do_not_overflow() -> None:
    for tokens, held in (([1], [700]), ([60], [40])):
        make_case(tokens, held, 2, 1, 64, 32, torch.float32, scale=50.0).check()


@pytest.mark.parametrize("tokens", [[1, 1], [30, 1]])
@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(
    instruction_set: str, dtype: torch.dtype, tokens: list[int]
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(tokens, [20, 9], 1, 2, 64, 16, dtype)
    case.query[0, 0, 0] = torch.nan
    y = case.run()
    assert y[0, 0, 0].isnan().all()
    assert y[0, 0, 1].isfinite().all()
    assert y[0, -1].isfinite().all()


def packed(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"query": torch.zeros(1, 4, 3, 16)}, TypeError, "all bfloat16, got Float"),
        ({"steps": torch.zeros(8)}, TypeError, "must be int32"),
        ({"tables": torch.zeros(1, 3, dtype=torch.int64)}, TypeError, "must be int32"),
        ({"query": torch.zeros(2, 4, 3, 16, dtype=torch.bfloat16)}, ValueError, "query must be"),
        ({"query": torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16)}, ValueError, "query must be"),
        ({"key": torch.zeros(1, 2, 2, 16, dtype=torch.bfloat16)}, ValueError, "query must be"),
        ({"query": torch.zeros(1, 3, 3, 16, dtype=torch.bfloat16)}, ValueError, "cannot share 2"),
        (
            {
                "query": torch.zeros(1, 4, 3, 12, dtype=torch.bfloat16),
                "key": torch.zeros(1, 2, 3, 12, dtype=torch.bfloat16),
                "value": torch.zeros(1, 2, 3, 12, dtype=torch.bfloat16),
            },
            ValueError,
            "multiple of 8 up to 256, got 12",
        ),
        ({"cache": torch.zeros(1, 2, 4, 1, 16, 16).bfloat16()}, ValueError, "cache must be"),
        ({"cache": torch.zeros(1, 2, 4, 2, 16, 32).bfloat16()[..., ::2]}, ValueError, "contiguous"),
        ({"cache": torch.zeros(1, 2, 4, 2, 24, 16).bfloat16()}, ValueError, "multiple of 16"),
        ({"layer": 1}, ValueError, "no layer 1, but 1"),
        ({"layer": -1}, ValueError, "no layer -1"),
        ({"window": -1}, ValueError, "window must not be negative"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
        ({"steps": packed()}, ValueError, "cannot hold 0 sequences"),
        ({"steps": packed(-1, 0, 0, 0, 0)}, ValueError, "cannot hold -1 sequences"),
        ({"steps": packed(2, 0, 1, 3, 0, 0, 0)}, ValueError, "cannot hold 2 sequences"),
        ({"steps": packed(2**31 - 1, 0, 1)}, ValueError, "cannot hold 2147483647 sequences"),
        ({"steps": packed(1, 1, 3, 5, 0)}, ValueError, "start at token 0, not 1"),
        ({"steps": packed(1, 0, 4, 5, 0)}, ValueError, "tokens 0 to 4 of 3"),
        ({"steps": packed(2, 0, 2, 1, 5, 5, 0, 1)}, ValueError, "tokens 2 to 1 of 3"),
        ({"steps": packed(1, 0, 3, -1, 0)}, ValueError, "of -1 tokens and 3 more"),
        ({"steps": packed(1, 0, 3, 46, 0)}, ValueError, "of 46 tokens and 3 more does not fit 3"),
        ({"steps": packed(1, 0, 3, 2**31 - 1, 0)}, ValueError, "does not fit 3"),
        ({"steps": packed(1, 0, 3, 5, 2)}, ValueError, "row 2 of a table of 2"),
        ({"steps": packed(1, 0, 3, 5, -1)}, ValueError, "row -1 of a table of 2"),
        ({"tables": packed(4, 0, 0, 0, 0, 0).view(2, 3)}, ValueError, "none of the cache's 4"),
        ({"tables": packed(-1, 0, 0, 0, 0, 0).view(2, 3)}, ValueError, "is -1, which is none"),
        ({"steps": packed(1, 0, 3, 30, 0)}, ValueError, "block 2 of sequence 0 is 9"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(
    change: dict[str, Any], error: type, says: str
) -> None:
    def good() -> dict[str, Any]:
        return {
            "query": torch.ones(1, 4, 3, 16, dtype=torch.bfloat16),
            "key": torch.ones(1, 2, 3, 16, dtype=torch.bfloat16),
            "value": torch.ones(1, 2, 3, 16, dtype=torch.bfloat16),
            "cache": torch.zeros(1, 2, 4, 2, 16, 16, dtype=torch.bfloat16),
            "steps": packed(1, 0, 3, 5, 0),
            "tables": packed(2, 0, 9, 1, 1, 1).view(2, 3),
            "layer": 0,
            "scale": 1.0,
        }

    fine = good()
    OPS.cached_attention(**fine)
    assert fine["cache"].count_nonzero() == 2 * 3 * 2 * 16
    wrong = good() | change
    with pytest.raises(error, match=says):
        OPS.cached_attention(**wrong)
    assert not wrong["cache"].any()


@pytest.mark.parametrize("tokens", [[1, 1], [9, 40], []])
def test_opcheck(tokens: list[int]) -> None:
    case = make_case(
        tokens, [20] * len(tokens), 2, 3, 16, 16, torch.bfloat16, padding=1, softcap=2.0
    )
    # Its comparisons take NaN for a difference.
    arguments = tuple(each.nan_to_num() for each in case.arguments())
    torch.library.opcheck(OPS.cached_attention.default, arguments, case.options)


def test_the_reference_is_what_torch_computes_in_float64() -> None:
    case = make_case([5, 20], [0, 0], 2, 3, 16, 16, torch.float32, scale=0.3)
    exact = case.expected().exact
    for mine in (slice(0, 5), slice(5, 25)):
        q, k, v = (each[:, :, mine].double() for each in (case.query, case.key, case.value))
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(exact[:, mine], plain.transpose(1, 2))
