"""The operator against float64 and against torch's own, on random shapes, strides and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitpoint import kernels
from splitpoint.kernels.attention import exceeded, reference

pytestmark = pytest.mark.usefixtures("poisoned")

OPS: Any = torch.ops.splitpoint

ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2))
"""How the dimensions of a query, key or value follow each other in memory."""

MASKS = ("none", "boolean", "additive", "float32")

thorough = settings(
    max_examples=200,
    deadline=None,
    # The fixture sets what every example needs, once; examples undo nothing of it.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass
class Case:
    """Arguments of attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    blockwise: bool = False

    def run(self, outside: bool = False) -> Tensor:
        y: Tensor = OPS.attention(
            self.query,
            self.key,
            self.value,
            self.mask,
            self.causal,
            scale=self.scale,
            enable_gqa=True,
            rows_outside=outside,
            blockwise=self.blockwise,
        )
        return y

    def torch(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.mask,
            is_causal=self.causal,
            scale=self.scale,
            enable_gqa=True,
        )

    def exceeded(self, y: Tensor) -> float:
        given = (self.query, self.key, self.value, self.mask, self.causal)
        return exceeded(y, *given, scale=self.scale, blockwise=self.blockwise)


def laid_out(values: Tensor, order: tuple[int, ...], gap: int) -> Tensor:
    """The same tensor with its dimensions in another order in memory, and NaN in between."""
    shape = [values.shape[dim] for dim in order]
    around = values.new_full([*shape[:-1], shape[-1] + gap], torch.nan)[..., : shape[-1]]
    result = around.permute([order.index(dim) for dim in range(4)])
    result.copy_(values)
    return result


def make_mask(kind: str, shape: list[int], dtype: torch.dtype, rng: torch.Generator) -> Any:
    if kind == "none":
        return None
    kept = torch.rand(shape, generator=rng) < 0.7
    kept[..., ::3, :] &= torch.rand((*kept[..., ::3, :].shape[:-1], 1), generator=rng) < 0.5
    if kind == "boolean":
        return kept
    added = torch.randn(shape, generator=rng).masked_fill(~kept, -torch.inf)
    return added.to(torch.float32 if kind == "float32" else dtype)


def make_case(
    batch: int,
    heads: int,
    group: int,
    queries: int,
    keys: int,
    size: int,
    value_size: int,
    dtype: torch.dtype,
    *,
    order: tuple[int, ...] = (0, 1, 2, 3),
    gap: int = 0,
    mask: str = "none",
    broadcast: tuple[bool, ...] = (False,) * 4,
    turned: bool = False,
    causal: bool = False,
    scale: float | None = None,
    blockwise: bool = False,
    seed: int = 0,
) -> Case:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return laid_out(torch.randn(shape, generator=rng).to(dtype), order, gap)

    dims = [batch, heads * group, queries, keys]
    shape = [1 if one else n for one, n in zip(broadcast, dims, strict=True)]
    made = make_mask(mask, shape, dtype, rng)
    if made is not None and turned:
        made = made.transpose(-1, -2).contiguous().transpose(-1, -2)
    return Case(
        normal(batch, heads * group, queries, size),
        normal(batch, heads, keys, size),
        normal(batch, heads, keys, value_size),
        made,
        causal,
        scale,
        blockwise,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    blockwise = draw(st.booleans())
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 96, 128, 256]))
    if blockwise:
        sizes = st.integers(1, 32).map(lambda eights: 8 * eights)
    size = draw(sizes)
    return make_case(
        draw(st.integers(0, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.one_of(st.integers(0, 20), st.sampled_from([48, 130]))),
        draw(st.one_of(st.integers(0, 40), st.sampled_from([64, 100, 200]))),
        size,
        draw(st.one_of(st.just(size), sizes)),
        draw(st.sampled_from([torch.bfloat16, torch.float32])),
        order=draw(st.sampled_from(ORDERS)),
        gap=draw(st.sampled_from([0, 3])),
        mask=draw(st.sampled_from(MASKS)),
        broadcast=tuple(draw(st.booleans()) for _ in range(4)),
        turned=draw(st.booleans()),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.125, -0.3, 2.0])),
        blockwise=blockwise,
        seed=draw(st.integers(0, 2**16)),
    )


@thorough
@given(
    case=cases(),
    threads=st.sampled_from([1, 2]),
    instruction_set=st.sampled_from(kernels.instruction_sets()),
    outside=st.booleans(),
)
def test_matches_float64(case: Case, threads: int, instruction_set: str, outside: bool) -> None:
    torch.set_num_threads(threads)
    kernels.use_instruction_set(instruction_set)
    y = case.run(outside)
    assert (y.transpose(1, 2) if outside else y).is_contiguous()
    assert case.exceeded(y) <= 1


@thorough
@given(case=cases())
def test_agrees_with_torch(case: Case) -> None:
    """Which rows are zero, above all: torch's own is the one that a model would have called."""
    if case.mask is not None and case.causal:
        case.causal = False  # torch documents that it refuses both
    if case.scale is not None:
        case.scale = abs(case.scale)  # of a negative one torch's own makes NaN where it is causal
    expected = case.torch()
    y = case.run()
    assert torch.equal(y.isnan(), expected.isnan())
    loose = 0.05 if y.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y, expected, rtol=loose, atol=loose, equal_nan=True)
    if case.mask is not None and y.numel():
        dead = case.mask.logical_not() if case.mask.dtype == torch.bool else case.mask.isneginf()
        rows = dead.expand(*y.shape[:3], case.key.shape[2]).all(-1)
        assert bool((y[rows] == 0).all())
        assert bool((expected[rows] == 0).all())


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "group", "queries", "keys", "size"),
    [(3, 3, 8, 8, 64), (9, 1, 16, 16, 64), (3, 3, 1, 700, 64), (2, 4, 130, 200, 128)],
)
def test_matches_float64_at_shapes_of_models(
    instruction_set: str,
    dtype: torch.dtype,
    heads: int,
    group: int,
    queries: int,
    keys: int,
    size: int,
    blockwise: bool,
) -> None:
    torch.set_num_threads(2)
    kernels.use_instruction_set(instruction_set)
    for mask, causal in (("boolean", False), ("none", True), ("none", False)):
        case = make_case(
            1, heads, group, queries, keys, size, size, dtype, mask=mask, causal=causal,
            order=(0, 2, 1, 3), broadcast=(True, True, False, False), blockwise=blockwise,
        )  # fmt: skip
        assert case.exceeded(case.run(outside=True)) <= 1


@thorough
@given(case=cases(), data=st.data())
def test_comparing_some_queries_sees_these_and_no_others(case: Case, data: st.DataObject) -> None:
    y = case.run()
    queries = case.query.shape[2]
    if queries < 2 or not y.numel():
        return
    wrong = data.draw(st.integers(0, queries - 1))
    y = y.clone()
    y[:, :, wrong] += 1 + y[:, :, wrong].abs().nan_to_num()
    others = torch.tensor([each for each in range(queries) if each != wrong])
    given = y, case.query, case.key, case.value, case.mask, case.causal
    options: Any = {"scale": case.scale, "blockwise": case.blockwise}
    assert exceeded(*given, **options, only=others) <= 1
    assert exceeded(*given, **options, only=torch.tensor([wrong])) > 1
    assert exceeded(*given, **options) > 1


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_expanded_heads_are_read_as_they_lie(mask: str, blockwise: bool) -> None:
    case = make_case(2, 1, 6, 5, 7, 64, 64, torch.bfloat16, mask=mask, blockwise=blockwise)
    alone = case.run()
    case.key, case.value = case.key.expand(2, 6, 7, 64), case.value.expand(2, 6, 7, 64)
    assert torch.equal(case.run(), alone)


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("keys", [20, 200])
def test_values_that_are_not_finite(
    instruction_set: str, dtype: torch.dtype, keys: int, blockwise: bool
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(1, 1, 1, 6, keys, 64, 64, dtype, blockwise=blockwise)
    case.mask = torch.zeros(6, keys)
    case.mask[1] = torch.inf
    case.mask[2, 3:] = torch.nan
    case.mask[3] = -torch.inf
    case.mask[4] = -torch.inf
    case.mask[4, 5] = torch.nan
    case.mask[5] = torch.finfo(torch.float32).min
    y, expected = case.run(), case.torch()
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[0, 0].isnan().all(-1).tolist() == [False, True, True, False, True, False]
    assert bool((y[0, 0, 3] == 0).all())
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize("blockwise", [False, True])
def test_scores_far_apart_do_not_overflow(blockwise: bool) -> None:
    case = make_case(1, 2, 1, 4, 133, 64, 64, torch.float32, scale=50.0, blockwise=blockwise)
    assert bool(case.run().isfinite().all())
    assert case.exceeded(case.run()) <= 1


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("mask", ["boolean", "additive", "float32"])
@pytest.mark.parametrize("kind", ["triangle", "band", "blocks", "padding", "corner"])
def test_pieces_that_a_mask_leaves_out(instruction_set: str, mask: str, kind: str) -> None:
    """Masks that leave out, or show, whole pieces of keys: those that models make."""
    kernels.use_instruction_set(instruction_set)
    rows, keys = torch.arange(150)[:, None], torch.arange(330)[None]
    shown = {
        "triangle": keys <= rows + 180,
        "band": (keys <= rows + 180) & (keys > rows + 20),
        "blocks": keys // 128 == rows // 64,
        "padding": (keys > 70) & (keys < 257) & (rows >= 0),
        "corner": (keys < 64) | (keys == 329) & (rows == 149),
    }[kind]
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(1, 2, 2, 150, 330, 64, 32, dtype, blockwise=True)
        added = torch.where(shown, 0.0, -torch.inf)
        made = {"boolean": shown, "float32": added, "additive": added.to(dtype)}[mask]
        case.mask = made[None, None].expand(1, 4, 150, 330)
        assert case.exceeded(case.run()) <= 1
        case.mask = made.t().contiguous().t()
        assert case.exceeded(case.run()) <= 1


@pytest.mark.parametrize("blockwise", [False, True])
def test_threads_and_neighbours_change_nothing(blockwise: bool) -> None:
    case = make_case(2, 8, 2, 40, 60, 64, 64, torch.bfloat16, causal=True, blockwise=blockwise)
    alone = case.run()
    torch.set_num_threads(2)
    assert torch.equal(case.run(), alone)
    case.key[1], case.value[1] = 7, 7
    assert torch.equal(case.run()[0], alone[0])
    case.key[:, :, 30:], case.value[:, :, 30:] = 3, 3
    assert torch.equal(case.run()[0, :, :30], alone[0, :, :30])


def good() -> dict[str, Any]:
    case = make_case(1, 2, 1, 3, 5, 16, 16, torch.bfloat16)
    return {"query": case.query, "key": case.key, "value": case.value}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"query": torch.zeros(2, 3, 16, dtype=torch.bfloat16)}, ValueError, "must be .batch"),
        ({"query": torch.zeros(1, 2, 3, 16)}, TypeError, "all bfloat16, got Float"),
        ({"query": torch.zeros(1, 2, 3, 17, dtype=torch.bfloat16)}, ValueError, "go together"),
        ({"value": torch.zeros(1, 2, 6, 16, dtype=torch.bfloat16)}, ValueError, "go together"),
        ({"query": torch.zeros(1, 4, 3, 16, dtype=torch.bfloat16)}, ValueError, "enable_gqa"),
        ({"attn_mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ({"attn_mask": torch.ones(3, 5, dtype=torch.float64)}, TypeError, "attn_mask must be"),
        (
            {"value": torch.zeros(1, 2, 5, 12, dtype=torch.bfloat16), "blockwise": True},
            ValueError,
            "multiple of 8 up to 256, got 16 and 12",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type, says: str) -> None:
    OPS.attention(**good())
    with pytest.raises(error, match=says):
        OPS.attention(**(good() | change))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("blockwise", [False, True])
def test_opcheck(mask: str, outside: bool, blockwise: bool) -> None:
    case = make_case(2, 2, 3, 5, 7, 16, 24, torch.bfloat16, mask=mask, order=(0, 2, 1, 3))
    arguments = (case.query, case.key, case.value, case.mask, mask == "none")
    options = {"scale": 0.5, "enable_gqa": True, "rows_outside": outside, "blockwise": blockwise}
    torch.library.opcheck(OPS.attention.default, arguments, options)


def test_the_reference_is_what_torch_computes_in_float64() -> None:
    case = make_case(2, 2, 3, 5, 7, 16, 24, torch.float32, mask="additive", scale=0.3)
    doubles = [each.double() for each in (case.query, case.key, case.value)]
    expected = F.scaled_dot_product_attention(
        *doubles, case.mask.double(), scale=0.3, enable_gqa=True
    )
    exact = reference(case.query, case.key, case.value, case.mask, scale=0.3)
    torch.testing.assert_close(exact, expected)
