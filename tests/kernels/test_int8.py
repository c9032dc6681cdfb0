"""Linear layers over int8 weights whose x is rounded to int8, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitpoint import kernels
from splitpoint.kernels import reference
from splitpoint.kernels.bounds import exceeded
from splitpoint.kernels.layout import BLOCK, quads, quads_of_packed, quads_shape
from tests.kernels.test_linear import LAYOUTS, Case, make_case, thorough

pytestmark = pytest.mark.usefixtures("poisoned")

OPS: Any = torch.ops.splitpoint

DTYPES = st.sampled_from([torch.bfloat16, torch.float32])

few = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def run(case: Case) -> list[Tensor]:
    weights = [quads(weight) for weight in case.weights]
    n = [weight.shape[0] for weight in case.weights]
    y: list[Tensor] = OPS.linear_packed(case.x, weights, n, **case.rest)
    return y


def check(case: Case, ys: list[Tensor]) -> None:
    assert all(y.is_contiguous() for y in ys)
    assert exceeded(ys, case.x, case.weights, **case.rest, rounds_x=True, exact_sums=True) <= 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 64, 96, 160, 257]))
    columns = st.one_of(dims, st.just(0))
    gated = draw(st.booleans())
    n = [draw(columns)] * 2 if gated else draw(st.lists(columns, min_size=1, max_size=3))
    case = make_case(
        draw(st.one_of(st.integers(0, 70), st.integers(71, 600))),
        n,
        draw(st.one_of(dims, st.just(0))),
        draw(DTYPES),
        int8=True,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()) and (gated or len(n) == 1),
        activation=draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        gated=gated,
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
    )
    # Rows of zeros, with one value that outgrows all others, and of tiny and of large values.
    for row, kind in enumerate(draw(st.lists(st.sampled_from("zhsl "), max_size=6))):
        if row < case.x.shape[0] and case.x.shape[1]:
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
    assert kernels.use_instruction_set(instruction_set) == instruction_set
    check(case, run(case))


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("t", "n", "k"),
    [
        (1, 576, 576),
        (14, 100, 1537),
        (20, 35, 1024),  # rows of x would compete for cache lines
        (200, 70, 301),  # rows are split between threads too
        (61, 40, 9001),  # k is taken in slices
        (3, 4100, 33),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matches_float64_at_larger_shapes(
    instruction_set: str, threads: int, t: int, n: int, k: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(threads)
    kernels.use_instruction_set(instruction_set)
    case = make_case(t, [n, 65], k, dtype, int8=True, bias=True, layout="strided")
    check(case, run(case))


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(("x", "weight"), [(1.0, -128), (1.0, 127), (-1.0, -128), (-1.0, 127)])
def test_the_largest_sums_are_exact(instruction_set: str, rows: int, x: float, weight: int) -> None:
    """All products as large as they can be, at the largest k: nothing saturates or overflows."""
    kernels.use_instruction_set(instruction_set)
    k = 132_104
    weights = torch.full((33, k), weight, dtype=torch.int8)
    (y,) = OPS.linear_packed(torch.full((rows, k), x), [quads(weights)], [33], [torch.ones(33)], [])
    expected = torch.tensor(x * 127 * weight * k).double() / 127
    assert ((y.double() / expected - 1).abs() < 3e-7).all()
    wider, packed = torch.zeros(1, k + 1), quads(torch.zeros(1, k + 1, dtype=torch.int8))
    with pytest.raises(ValueError, match="hold a k of 132104 at most, got 132105"):
        OPS.linear_packed(wider, [packed], [1], [torch.ones(1)], [])


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [5, 40])
def test_a_row_that_is_not_finite_has_no_finite_result(
    instruction_set: str, dtype: torch.dtype, activation: str, value: float, rows: int
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(
        rows, [40, 40], 33, dtype, int8=True, bias=True, activation=activation, gated=rows == 5
    )
    clean = run(case)
    others = [row for row in range(rows) if row not in (2, 3)]
    case.x[2, 32] = value
    case.x[3, 0] = value
    for y, before in zip(run(case), clean, strict=True):
        assert y[2:4].isnan().all()
        assert torch.equal(y[others], before[others])


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@few
@given(
    k=st.sampled_from([1, 2, 3, 31, 64, 301, 2048, 9001]),
    dtype=DTYPES,
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    threads=st.sampled_from([1, 2]),
    gated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_rows_have_the_bits_that_they_have_alone(
    instruction_set: str,
    k: int,
    dtype: torch.dtype,
    parts: list[int],
    threads: int,
    gated: bool,
    seed: int,
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(
        sum(parts), [40] * 2 if gated else [40], k, dtype,
        int8=True, bias=True, residual=True, gated=gated, activation="silu", seed=seed,
    )  # fmt: skip
    weights = [quads(weight) for weight in case.weights]
    n = [weight.shape[0] for weight in case.weights]
    torch.set_num_threads(threads)
    (together,) = OPS.linear_packed(case.x, weights, n, **case.rest)
    torch.set_num_threads(1)
    start = 0
    for rows in parts:
        part = slice(start, start + rows)
        rest = case.rest | {"residual": case.residual[part] if case.residual is not None else None}
        (apart,) = OPS.linear_packed(case.x[part], weights, n, **rest)
        assert torch.equal(apart, together[part])
        start += rows


@few
@given(case=cases())
def test_all_instruction_sets_round_x_to_the_same_values(case: Case) -> None:
    """A weight of one k after the other shows the values, and one scale makes them whole."""
    k = case.x.shape[1]
    one = torch.eye(k, dtype=torch.int8)
    expected, scale = reference.quantised_rows(case.x)
    for instruction_set in kernels.instruction_sets():
        kernels.use_instruction_set(instruction_set)
        (y,) = OPS.linear_packed(case.x.float(), [quads(one)], [k], [torch.ones(k)], [])
        assert torch.equal(y, expected * scale[:, None])


@given(x=st.lists(st.floats(width=32, allow_nan=True), max_size=30))
def test_rounded_values_are_within_half_a_step(x: list[float]) -> None:
    row = torch.tensor(x, dtype=torch.float32)[None]
    values, scale = reference.quantised_rows(row)
    assert values.dtype == torch.int8
    assert scale.shape == (1,)
    if not row.isfinite().all():
        assert scale.isnan().all()
        assert not values.any()
        return
    assert bool((values.abs().int() <= 127).all())
    error = (values.double() * scale.double()[:, None] - row.double()).abs()
    assert bool((error <= 0.5001 * scale.double()[:, None]).all())


@given(rows=st.integers(0, 100), k=st.integers(0, 70))
@thorough
def test_the_layout_is_the_documented_one(rows: int, k: int) -> None:
    weight = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
    blocks, groups, *_ = shape = quads_shape(rows, k)
    made = quads(weight)
    assert made.shape == quads_of_packed(OPS.pack_weight(weight)).shape == shape
    assert made.is_contiguous()
    whole = weight.new_zeros(blocks * BLOCK, groups * 4)
    whole[:rows, :k] = weight
    assert torch.equal(made.permute(0, 2, 1, 3).reshape(whole.shape), whole)
    assert torch.equal(quads_of_packed(OPS.pack_weight(weight)), made)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(3, 10)}, ValueError, "bias must be of x.s dtype"),
        ({"x": torch.zeros(3, 14, dtype=torch.bfloat16)}, ValueError, "is not one for k = 14"),
        ({"n": [65]}, ValueError, "and 65 columns"),
        ({"scales": []}, ValueError, "an int8 weight needs its scale"),
        ({"x": torch.zeros(3, 10, dtype=torch.float16)}, TypeError, "float32, bfloat16 or int8"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type, says: str) -> None:
    case = make_case(3, [40], 10, torch.bfloat16, int8=True, bias=True)
    given = {"x": case.x, "weights": [quads(case.weights[0])], "n": [40], **case.rest}
    OPS.linear_packed(**given)
    with pytest.raises(error, match=says):
        OPS.linear_packed(**(given | change))


def test_weights_of_both_kinds_do_not_go_together() -> None:
    case = make_case(3, [40, 40], 10, torch.float32, int8=True)
    both = [quads(case.weights[0]), OPS.pack_weight(case.weights[1])]
    with pytest.raises(ValueError, match="is not one for k = 10"):
        OPS.linear_packed(case.x, both, [40, 40], **case.rest)
    with pytest.raises(ValueError, match="must lie as pack_weight"):
        OPS.unpack_weight(both[0], case.scales[0], 40, 10, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    case = make_case(3, [40], 10, dtype, int8=True, bias=True, residual=True, activation="silu")
    gated = make_case(3, [40, 40], 10, dtype, int8=True, activation="silu", gated=True)
    for each in (case, gated):
        packed = [quads(weight) for weight in each.weights]
        n = [weight.shape[0] for weight in each.weights]
        torch.library.opcheck(OPS.linear_packed.default, (each.x, packed, n), each.rest)
