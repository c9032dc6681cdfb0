"""The operators against float64, on random shapes, dtypes, layouts and instruction sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitpoint import kernels
from splitpoint.kernels import reference
from splitpoint.kernels.bounds import exceeded
from splitpoint.kernels.layout import packed_shape, quantize

pytestmark = pytest.mark.usefixtures("poisoned")

OPS: Any = torch.ops.splitpoint

LAYOUTS = ("contiguous", "strided", "offset", "transposed")

thorough = settings(
    max_examples=400,
    deadline=None,
    # The fixture sets what every example needs, once; examples undo nothing of it.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass
class Case:
    """Arguments of linear layers over one x, their weights still unpacked."""

    x: Tensor
    weights: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor]
    residual: Tensor | None = None
    activation: str = "none"
    gated: bool = False

    @property
    def rest(self) -> dict[str, Any]:
        return {
            "scales": self.scales,
            "biases": self.biases,
            "residual": self.residual,
            "activation": self.activation,
            "gated": self.gated,
        }

    def packed(self) -> list[Tensor]:
        weights = [OPS.pack_weight(weight) for weight in self.weights]
        n = [weight.shape[0] for weight in self.weights]
        y: list[Tensor] = OPS.linear_packed(self.x, weights, n, **self.rest)
        return y

    def gemv(self) -> list[Tensor]:
        y: list[Tensor] = OPS.linear_gemv(self.x, self.weights, **self.rest)
        return y

    def check(self, ys: list[Tensor]) -> None:
        assert all(y.is_contiguous() for y in ys)
        assert exceeded(ys, self.x, self.weights, **self.rest) <= 1


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same matrix in another layout; what lies between its rows is NaN."""
    t, k = values.shape
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.t().contiguous().t()
    left, right = (1, 0) if layout == "offset" else (0, 3)
    around = values.new_full((t, left + k + right), torch.nan)
    around[:, left : left + k] = values
    return around[:, left : left + k]


def make_case(
    t: int,
    n: Sequence[int],
    k: int,
    dtype: torch.dtype,
    *,
    int8: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    gated: bool = False,
    layout: str = "contiguous",
    seed: int = 0,
) -> Case:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    weights, scales = [normal(columns, k) for columns in n], []
    if int8:
        weights, scales = map(list, zip(*map(quantize, weights), strict=True))
        for weight in weights:
            # -128 is no result of quantize, but is a value an int8 weight may hold.
            weight[:, ::7] = -128
    return Case(
        laid_out(normal(t, k), layout),
        weights,
        scales,
        [normal(columns) for columns in n] if bias else [],
        laid_out(normal(t, n[0]), layout) if residual else None,
        activation,
        gated,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Small shapes find edges fast; multiples of the blocks and larger ones reach every loop.
    dims = st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 64, 96, 160, 257]))
    columns = st.one_of(dims, st.just(0))
    gated = draw(st.booleans())
    n = [draw(columns)] * 2 if gated else draw(st.lists(columns, min_size=1, max_size=3))
    return make_case(
        draw(st.integers(0, 70)),
        n,
        draw(st.one_of(dims, st.just(0))),
        draw(st.sampled_from([torch.bfloat16, torch.float32])),
        int8=draw(st.booleans()),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()) and (gated or len(n) == 1),
        activation=draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        gated=gated,
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
    )


@thorough
@given(
    case=cases(),
    threads=st.sampled_from([1, 2]),
    instruction_set=st.sampled_from(kernels.instruction_sets()),
    variant=st.sampled_from([Case.packed, Case.gemv]),
)
def test_matches_float64(case: Case, threads: int, instruction_set: str, variant: Any) -> None:
    torch.set_num_threads(threads)
    assert kernels.use_instruction_set(instruction_set) == instruction_set
    case.check(variant(case))


@thorough
@given(
    t=st.integers(1, 16),
    n=st.sampled_from([1, 32, 40, 70]),
    slices=st.integers(0, 3),
    beyond=st.integers(-3, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    int8=st.booleans(),
    gated=st.booleans(),
    instruction_set=st.sampled_from(kernels.instruction_sets()),
)
def test_matches_float64_where_columns_take_several_passes(
    t: int,
    n: int,
    slices: int,
    beyond: int,
    dtype: torch.dtype,
    int8: bool,
    gated: bool,
    instruction_set: str,
) -> None:
    kernels.use_instruction_set(instruction_set)
    in_a_slice = (16 << 10) // (32 * (1 if int8 else dtype.itemsize))
    k = max(1, slices * in_a_slice + beyond)
    case = make_case(t, [n, n], k, dtype, int8=int8, gated=gated, bias=True)
    case.check(case.packed())


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("variant", ["packed", "gemv"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("t", "n", "k"),
    [
        (1, 576, 576),
        (14, 100, 1537),
        (15, 33, 576),
        (20, 35, 1024),  # rows of x would compete for cache lines
        (200, 70, 301),  # rows are split between threads too
        (61, 40, 9001),  # k is taken in slices
        (430, 70, 577),  # rows are taken in bands
        (3, 4100, 33),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "int8"), [("bfloat16", False), ("float32", False), ("bfloat16", True)]
)
def test_matches_float64_at_larger_shapes(
    instruction_set: str, variant: str, threads: int, t: int, n: int, k: int, dtype: str, int8: bool
) -> None:
    torch.set_num_threads(threads)
    kernels.use_instruction_set(instruction_set)
    case = make_case(t, [n, 65], k, getattr(torch, dtype), int8=int8, bias=True, layout="strided")
    case.check(getattr(case, variant)())


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
def test_activations_over_their_whole_range(
    activation: str, gated: bool, instruction_set: str
) -> None:
    """A weight of one k makes the activation's argument whatever x is."""
    kernels.use_instruction_set(instruction_set)
    x = torch.linspace(-120, 120, 4001)[:, None]
    weights = [torch.ones(32, 1)] * (2 if gated else 1)
    case = Case(x, weights, [], [], None, activation, gated)
    case.check(case.packed())
    case.check(case.gemv())


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_stay_in_their_row(
    instruction_set: str, dtype: torch.dtype, value: float
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(5, [40], 33, dtype)
    case.x[2, 32] = value
    (expected,) = reference.linear(case.x, case.weights)
    for (y,) in (case.packed(), case.gemv()):
        assert torch.equal(y[2].isnan(), expected[2].isnan())
        assert torch.equal(y[2].isinf(), expected[2].isinf())
        assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((33,), (0,)),
        ((1, 5, 33), (0, 1, 2)),
        ((5, 1, 33), (1, 0, 2)),
        ((2, 3, 33), (0, 1, 2)),
        ((2, 3, 33), (1, 0, 2)),  # no even step from row to row
        ((2, 3, 33), (2, 1, 0)),
        ((2, 0, 33), (0, 1, 2)),
        ((2, 3, 4, 33), (0, 2, 1, 3)),
    ],
)
def test_any_number_of_dimensions(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """`order` is how the dimensions follow each other in memory."""
    inverse = [order.index(dim) for dim in range(len(order))]
    x = torch.randn([shape[dim] for dim in order]).permute(inverse)
    assert x.shape == shape
    residual = torch.randn(*shape[:-1], 40)
    case = Case(x, [torch.randn(40, 33)], [], [], residual)
    case.check(case.packed())
    case.check(case.gemv())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_and_row_counts_change_nothing_in_fp32_sums(dtype: torch.dtype) -> None:
    """A token's output depends on neither its neighbours' values nor the number of threads."""
    case = make_case(200, [70, 70], 64, dtype, activation="silu", gated=True)
    torch.set_num_threads(1)
    (alone,) = case.packed()
    torch.set_num_threads(2)
    assert torch.equal(case.packed()[0], alone)
    case.x[:100] = 7
    assert torch.equal(case.packed()[0][100:], alone[100:])


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    k=st.sampled_from([1, 2, 3, 31, 64, 301, 2048, 9001]),  # the last one is taken in slices
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    int8=st.booleans(),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    threads=st.sampled_from([1, 2]),
    gated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_batch_invariant_rows_have_the_bits_that_they_have_alone(
    instruction_set: str,
    k: int,
    dtype: torch.dtype,
    int8: bool,
    parts: list[int],
    threads: int,
    gated: bool,
    seed: int,
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(
        sum(parts), [40] * 2 if gated else [40], k, dtype,
        int8=int8, bias=True, residual=True, gated=gated, activation="silu", seed=seed,
    )  # fmt: skip
    weights = [OPS.pack_weight(weight) for weight in case.weights]
    n = [weight.shape[0] for weight in case.weights]
    torch.set_num_threads(threads)
    (together,) = OPS.linear_packed(case.x, weights, n, **case.rest, batch_invariant=True)
    case.check([together])
    torch.set_num_threads(1)
    start = 0
    for rows in parts:
        part = slice(start, start + rows)
        rest = case.rest | {"residual": case.residual[part] if case.residual is not None else None}
        (apart,) = OPS.linear_packed(case.x[part], weights, n, **rest, batch_invariant=True)
        assert torch.equal(apart, together[part])
        start += rows


@given(
    rows=st.integers(0, 100),
    k=st.integers(0, 70),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8]),
    transposed=st.booleans(),
)
@thorough
def test_pack_weight_has_the_documented_layout(
    rows: int, k: int, dtype: torch.dtype, transposed: bool
) -> None:
    weight = torch.randint(-128, 128, (rows, k)).to(dtype)
    given_weight = weight.t().contiguous().t() if transposed else weight
    packed = OPS.pack_weight(given_weight)
    expected = reference.pack_weight(weight)
    assert packed.shape == expected.shape == packed_shape(rows, k, dtype)
    assert packed.dtype == dtype
    assert packed.is_contiguous()
    assert torch.equal(packed, expected)


@given(rows=st.integers(1, 20), k=st.integers(0, 40), seed=st.integers(0, 1000))
@thorough
def test_quantize_is_within_half_a_step(rows: int, k: int, seed: int) -> None:
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    values, scale = quantize(weight)
    assert values.dtype == torch.int8
    assert scale.shape == (rows,)
    assert bool((scale > 0).all())
    error = (values.double() * scale[:, None] - weight).abs()
    assert bool((error <= scale[:, None].double() * 0.5001).all())


def good() -> dict[str, Any]:
    case = make_case(3, [40], 10, torch.bfloat16, bias=True, residual=True)
    return {"x": case.x, "weights": [OPS.pack_weight(case.weights[0])], "n": [40], **case.rest}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(3, 10)}, TypeError, "its dtype or int8"),
        ({"x": torch.zeros(3, 10, dtype=torch.float16)}, TypeError, "float32, bfloat16 or int8"),
        ({"x": torch.zeros(3, 10, dtype=torch.int8)}, TypeError, "float32 or bfloat16"),
        ({"x": torch.zeros((), dtype=torch.bfloat16)}, ValueError, "x must be"),
        ({"x": torch.zeros(3, 12, dtype=torch.bfloat16)}, ValueError, "is not one for k = 12"),
        ({"weights": []}, ValueError, "there must be a weight, got 0"),
        ({"gated": True}, ValueError, "two weights, of the gate and of what it gates, got 1"),
        ({"n": [65]}, ValueError, "and 65 columns"),
        ({"n": [-1]}, ValueError, "negative"),
        ({"n": [40, 40]}, ValueError, "columns of each weight"),
        ({"biases": [torch.zeros(40)]}, ValueError, "bias"),
        ({"biases": [torch.zeros(39, dtype=torch.bfloat16)]}, ValueError, "bias"),
        ({"biases": [torch.zeros(40, dtype=torch.bfloat16)] * 2}, ValueError, "as many biases"),
        ({"residual": torch.zeros(1, 40, dtype=torch.bfloat16)}, ValueError, "residual"),
        ({"scales": [torch.ones(40)]}, ValueError, "int8 weight needs"),
        ({"activation": "relu"}, ValueError, "got relu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type, says: str) -> None:
    OPS.linear_packed(**good())
    with pytest.raises(error, match=says):
        OPS.linear_packed(**(good() | change))


def test_an_int8_weight_needs_its_scale() -> None:
    case = make_case(2, [32], 8, torch.float32, int8=True)
    with pytest.raises(ValueError, match="int8 weight needs its scale"):
        OPS.linear_gemv(case.x, case.weights, [], [])


def test_weights_must_go_together() -> None:
    x, one, two = torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="a gate of 3 columns cannot gate 5"):
        OPS.linear_gemv(x, [one, two], [], [], gated=True)
    with pytest.raises(ValueError, match="only a single result"):
        OPS.linear_gemv(x, [one, two], [], [], residual=torch.zeros(1, 3))
    with pytest.raises(TypeError, match="weights of its dtype"):
        OPS.linear_gemv(x, [one, two.bfloat16()], [], [])


def test_an_instruction_set_this_cpu_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set named 'mmx'"):
        kernels.use_instruction_set("mmx")
    assert kernels.use_instruction_set("portable") == "portable"
    assert kernels.use_instruction_set() == kernels.instruction_sets()[0]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "int8"), [("bfloat16", False), ("float32", True)])
def test_opcheck(activation: str, dtype: str, int8: bool) -> None:
    case = make_case(
        3,
        [40],
        10,
        getattr(torch, dtype),
        int8=int8,
        bias=True,
        residual=True,
        activation=activation,
    )
    gated = make_case(
        3, [40, 40], 10, getattr(torch, dtype), int8=int8, activation=activation, gated=True
    )
    several = make_case(3, [40, 7], 10, getattr(torch, dtype), int8=int8, bias=True)
    torch.library.opcheck(OPS.pack_weight.default, (case.weights[0],))
    for each in (case, gated, several):
        packed = [OPS.pack_weight(weight) for weight in each.weights]
        n = [weight.shape[0] for weight in each.weights]
        torch.library.opcheck(OPS.linear_packed.default, (each.x, packed, n), each.rest)
        torch.library.opcheck(OPS.linear_gemv.default, (each.x, each.weights), each.rest)


@pytest.mark.slow
def test_inductor_calls_it_at_every_size() -> None:
    case = make_case(6, [40, 40], 10, torch.bfloat16)
    packed = [OPS.pack_weight(weight) for weight in case.weights]

    @torch.compile(fullgraph=True, dynamic=True)
    def forward(x: Tensor, packed: list[Tensor]) -> Tensor:
        first, second = OPS.linear_packed(torch.relu(x), packed, [40, 40], [], [])
        y: Tensor = first - second
        return y

    for t in (6, 1, 9):
        x = case.x[:1].expand(t, -1)
        first, second = OPS.linear_packed(torch.relu(x), packed, [40, 40], [], [])
        assert torch.equal(forward(x, packed), first - second)
