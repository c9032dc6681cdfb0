"""Linear layers over 4-bit weights whose x is rounded to int8, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitpoint import kernels
from splitpoint.kernels import reference
from splitpoint.kernels.bounds import U32, exceeded
from splitpoint.kernels.int4 import INT4_FORMATS, Int4Format, pack_int4
from splitpoint.kernels.layout import quads
from tests.kernels.test_int4 import Case, make_case, thorough
from tests.kernels.test_int8 import few

pytestmark = pytest.mark.usefixtures("poisoned")

OPS: Any = torch.ops.splitpoint

DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


def run(case: Case, rows: slice | None = None, batch_invariant: bool = False) -> list[Tensor]:
    part = slice(None) if rows is None else rows
    y: list[Tensor] = OPS.linear_packed(
        case.x[part],
        case.packed,
        [weight.shape[0] for weight in case.weights],
        [],
        case.biases,
        None if case.residual is None else case.residual[part],
        case.activation,
        case.gated,
        batch_invariant,
        True,
    )
    return y


def check(case: Case, ys: Sequence[Tensor]) -> None:
    assert all(y.is_contiguous() for y in ys)
    worst = exceeded(
        ys,
        case.x,
        case.weights,
        biases=case.biases,
        residual=case.residual,
        activation=case.activation,
        gated=case.gated,
        # Nothing is rounded but sums of groups and scales.
        off=[(each.shape[1] // 32 + 4) * U32 * each.abs() for each in case.weights],
        rounds_x=True,
    )
    assert worst <= 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    columns = st.one_of(st.integers(0, 70), st.sampled_from([32, 64, 160]))
    gated = draw(st.booleans())
    n = [draw(columns)] * 2 if gated else draw(st.lists(columns, min_size=1, max_size=3))
    made = draw(st.sampled_from(INT4_FORMATS))
    case = make_case(
        draw(st.one_of(st.integers(0, 40), st.integers(41, 300))),
        n,
        made.group * draw(st.integers(1, 9)),
        made,
        draw(DTYPES),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()) and (gated or len(n) == 1),
        activation=draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        gated=gated,
        gap=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 2**16)),
    )
    # Rows of zeros, with one value that outgrows all others, and of tiny and of large values.
    for row, kind in enumerate(draw(st.lists(st.sampled_from("zhsl "), max_size=6))):
        if row < case.x.shape[0]:
            if kind == "z":
                case.x[row] = 0
            if kind == "h":
                case.x[row, draw(st.integers(0, case.x.shape[1] - 1))] = -3e4
            case.x[row] *= {"s": 1e-12, "l": 1e12}.get(kind, 1.0)
    return case


@thorough
@given(
    case=cases(),
    threads=st.sampled_from([1, 2]),
    instruction_set=st.sampled_from(kernels.instruction_sets()),
)
def test_matches_float64(case: Case, threads: int, instruction_set: str) -> None:
    torch.set_num_threads(threads)
    kernels.use_instruction_set(instruction_set)
    check(case, run(case))


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("t", "n", "k", "made"),
    [
        (1, 576, 576, Int4Format(64)),
        (14, 100, 1536, Int4Format(32, True)),
        (27, 100, 1536, Int4Format(128, True, True)),
        (20, 35, 1024, Int4Format(32)),  # rows of x would compete for cache lines
        (200, 70, 384, Int4Format(128, True, True)),  # rows are split between threads too
        (61, 40, 8192 + 64, Int4Format(64, True)),
        (3, 4100, 32, Int4Format(32, True)),
    ],
    ids=str,
)
def test_matches_float64_at_larger_shapes(
    instruction_set: str, dtype: torch.dtype, t: int, n: int, k: int, made: Int4Format
) -> None:
    torch.set_num_threads(2)
    kernels.use_instruction_set(instruction_set)
    case = make_case(t, [n, 65], k, made, dtype, bias=True, gap=3)
    check(case, run(case))


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("x", [1.0, -1.0])
@pytest.mark.parametrize(("value", "zero"), [(-8, 7), (7, -8), (-8, 0), (7, 0)])
def test_the_largest_sums_are_exact(
    instruction_set: str, rows: int, group: int, x: float, value: int, zero: int
) -> None:
    """All products as large as they can be: nothing saturates or overflows."""
    kernels.use_instruction_set(instruction_set)
    values = torch.full((33, group), value, dtype=torch.int8)
    zeros = torch.full((33, 1), zero, dtype=torch.int8) if zero else None
    packed = pack_int4(values, torch.ones(33, 1, dtype=torch.bfloat16), zeros)
    given_ = torch.full((rows, group), 127 * x)
    (y,) = OPS.linear_packed(given_, [packed], [33], [], [], round_x=True)
    assert torch.equal(y, torch.full((rows, 33), 127.0 * x * (value - zero) * group))


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [5, 40])
def test_a_row_that_is_not_finite_has_no_finite_result(
    instruction_set: str, dtype: torch.dtype, value: float, rows: int
) -> None:
    kernels.use_instruction_set(instruction_set)
    made = Int4Format(32, zero_points=rows == 5)
    case = make_case(rows, [40, 40], 64, made, dtype, bias=True, activation="silu", gated=rows == 5)
    clean = run(case)
    others = [row for row in range(rows) if row not in (2, 3)]
    case.x[2, 63] = value
    case.x[3, 0] = value
    for y, before in zip(run(case), clean, strict=True):
        assert y[2:4].isnan().all()
        assert torch.equal(y[others], before[others])


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@few
@given(
    made=st.sampled_from(INT4_FORMATS),
    groups=st.sampled_from([1, 2, 9, 40]),
    dtype=DTYPES,
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    threads=st.sampled_from([1, 2]),
    gated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_rows_have_the_bits_that_they_have_alone(
    instruction_set: str,
    made: Int4Format,
    groups: int,
    dtype: torch.dtype,
    parts: list[int],
    threads: int,
    gated: bool,
    seed: int,
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(
        sum(parts), [40] * 2 if gated else [40], groups * made.group, made, dtype,
        bias=True, residual=True, gated=gated, activation="silu", seed=seed,
    )  # fmt: skip
    torch.set_num_threads(threads)
    (together,) = run(case, batch_invariant=True)
    torch.set_num_threads(1)
    start = 0
    for rows in parts:
        part = slice(start, start + rows)
        (apart,) = run(case, part)
        assert torch.equal(apart, together[part])
        start += rows


@few
@given(groups=st.integers(1, 5), t=st.integers(0, 20), seed=st.integers(0, 999))
def test_all_instruction_sets_round_x_to_the_same_values(groups: int, t: int, seed: int) -> None:
    """A weight of one k after the other shows the values, and one scale makes them whole."""
    k = 32 * groups
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(seed))
    one = torch.eye(k, dtype=torch.int8)
    packed = pack_int4(one, torch.ones(k, groups, dtype=torch.bfloat16))
    expected, scale = reference.quantised_rows(x)
    for instruction_set in kernels.instruction_sets():
        kernels.use_instruction_set(instruction_set)
        (y,) = OPS.linear_packed(x, [packed], [k], [], [], round_x=True)
        assert torch.equal(y, expected * scale[:, None])


def test_weights_of_other_kinds_are_refused() -> None:
    x, weight = torch.zeros(3, 64), torch.zeros(40, 64)
    with pytest.raises(ValueError, match="round_x is for packed weights of 4 bits"):
        OPS.linear_packed(x, [OPS.pack_weight(weight)], [40], [], [], round_x=True)
    int8 = weight.to(torch.int8)
    with pytest.raises(ValueError, match="round_x is for packed weights of 4 bits"):
        OPS.linear_packed(x, [OPS.pack_weight(int8)], [40], [torch.ones(40)], [], round_x=True)
    given_ = [quads(int8)], [40], [torch.ones(40)], []
    implied, said = (OPS.linear_packed(x, *given_, round_x=each)[0] for each in (False, True))
    assert torch.equal(implied, said)


@pytest.mark.parametrize(
    ("made", "dtype"),
    [(Int4Format(32, True), torch.bfloat16), (Int4Format(32, False, True), torch.float32)],
    ids=str,
)
def test_opcheck(made: Int4Format, dtype: torch.dtype) -> None:
    case = make_case(3, [40], 64, made, dtype, bias=True, residual=True)
    torch.library.opcheck(
        OPS.linear_packed.default,
        (case.x, case.packed, [40], [], case.biases, case.residual),
        {"round_x": True},
    )
