"""4-bit weights in groups: the kernels against float64, and the layout against its reference."""

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
from splitpoint.kernels.bounds import ROUNDOFF, U32, exceeded
from splitpoint.kernels.int4 import (
    GROUPS,
    INT4_FORMATS,
    Int4Format,
    dequantize_int4,
    int4_format,
    pack_int4,
    quantize_int4,
    unpack_int4,
)
from splitpoint.kernels.layout import quantize

pytestmark = pytest.mark.usefixtures("poisoned")

OPS: Any = torch.ops.splitpoint

thorough = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass
class Case:
    """Arguments of linear layers over one x, and the weights that packed ones stand for."""

    x: Tensor
    packed: list[Tensor]
    weights: list[Tensor]
    off: list[Tensor]
    biases: list[Tensor]
    residual: Tensor | None
    activation: str
    gated: bool

    def run(self) -> list[Tensor]:
        n = [weight.shape[0] for weight in self.weights]
        y: list[Tensor] = OPS.linear_packed(
            self.x, self.packed, n, [], self.biases, self.residual, self.activation, self.gated
        )
        return y

    def check(self, ys: list[Tensor]) -> None:
        assert all(y.is_contiguous() for y in ys)
        worst = exceeded(
            ys,
            self.x,
            self.weights,
            biases=self.biases,
            residual=self.residual,
            activation=self.activation,
            gated=self.gated,
            off=self.off,
        )
        assert worst <= 1


def drawn(
    n: int, k: int, made: Int4Format, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Any values, scales and zero points that there can be, not only what quantising makes."""
    values = torch.randint(-8, 8, (n, k), generator=rng, dtype=torch.int8)
    # Of float16 where they are wide: so that a weight is exact in float32.
    scales = torch.randn(n, k // made.group, generator=rng)
    scales = scales.half().float() if made.wide_scales else scales.to(torch.bfloat16)
    zeros = torch.randint(-8, 8, (n, k // made.group), generator=rng, dtype=torch.int8)
    return values, scales, zeros if made.zero_points else None


def make_case(
    t: int,
    n: Sequence[int],
    k: int,
    made: Int4Format,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    gated: bool = False,
    gap: int = 0,
    seed: int = 0,
) -> Case:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    def spaced(values: Tensor) -> Tensor:
        around = values.new_full((values.shape[0], values.shape[1] + gap), torch.nan)
        around[:, : values.shape[1]] = values
        return around[:, : values.shape[1]]

    packed, weights, off = [], [], []
    for columns in n:
        values, scales, zeros = drawn(columns, k, made, rng)
        packed.append(pack_int4(values, scales, zeros))
        weights.append(dequantize_int4(values, scales, zeros))
        # Zero points are taken off the sums, so that these may be as large as without them; and
        # in bf16 the kernels for many rows round what they unpack.
        parts = dequantize_int4(values, scales).abs()
        if zeros is not None:
            parts += dequantize_int4(values.zero_(), scales, zeros).abs()
        off.append((k + 4) * U32 * parts)
        if dtype == torch.bfloat16:
            off[-1] += ROUNDOFF[dtype] * weights[-1].abs()
    return Case(
        spaced(normal(t, k)),
        packed,
        weights,
        off,
        [normal(columns) for columns in n] if bias else [],
        spaced(normal(t, n[0])) if residual else None,
        activation,
        gated,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    columns = st.one_of(st.integers(0, 70), st.sampled_from([32, 64, 160]))
    gated = draw(st.booleans())
    n = [draw(columns)] * 2 if gated else draw(st.lists(columns, min_size=1, max_size=3))
    made = draw(st.sampled_from(INT4_FORMATS))
    return make_case(
        draw(st.integers(0, 40)),
        n,
        made.group * draw(st.integers(1, 9)),
        made,
        draw(st.sampled_from([torch.bfloat16, torch.float32])),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()) and (gated or len(n) == 1),
        activation=draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        gated=gated,
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
    torch.set_num_threads(threads)
    kernels.use_instruction_set(instruction_set)
    case.check(case.run())


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("t", "n", "k", "made"),
    [
        (1, 576, 576, Int4Format(64)),
        (12, 100, 1536, Int4Format(32, True)),
        (12, 100, 1536, Int4Format(128, True, True)),
        (13, 33, 640, Int4Format(128, True)),
        (20, 35, 1024, Int4Format(32)),  # rows of x would compete for cache lines
        (200, 70, 384, Int4Format(128, True, True)),  # rows are split between threads too
        # k is unpacked in slices, for two groups of rows
        (115, 40, 4096 + 32, Int4Format(32, True)),
        (115, 40, 4096 + 32, Int4Format(32, False, True)),
        (3, 4100, 32, Int4Format(32, True)),
    ],
    ids=str,
)
def test_matches_float64_at_larger_shapes(
    instruction_set: str,
    dtype: torch.dtype,
    t: int,
    n: int,
    k: int,
    made: Int4Format,
) -> None:
    torch.set_num_threads(2)
    kernels.use_instruction_set(instruction_set)
    case = make_case(t, [n, 65], k, made, dtype, bias=True, gap=3)
    case.check(case.run())


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("t", [5, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_in_their_row(
    instruction_set: str, t: int, value: float
) -> None:
    kernels.use_instruction_set(instruction_set)
    case = make_case(t, [40], 64, Int4Format(32, True), torch.bfloat16)
    case.x[2, 32] = value
    (y,) = case.run()
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("made", [Int4Format(32), Int4Format(32, True)], ids=str)
def test_threads_and_neighbours_change_nothing(made: Int4Format) -> None:
    for t in (9, 200):
        case = make_case(t, [70, 70], 64, made, torch.bfloat16, gated=True)
        torch.set_num_threads(1)
        (alone,) = case.run()
        torch.set_num_threads(2)
        assert torch.equal(case.run()[0], alone)
        case.x[: t // 2] = 7
        assert torch.equal(case.run()[0][t // 2 :], alone[t // 2 :])


@thorough
@given(
    n=st.integers(0, 70),
    groups=st.integers(1, 5),
    made=st.sampled_from(INT4_FORMATS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    instruction_set=st.sampled_from(kernels.instruction_sets()),
    seed=st.integers(0, 1000),
)
def test_packed_weights_unpack_to_what_they_stand_for(
    n: int,
    groups: int,
    made: Int4Format,
    dtype: torch.dtype,
    instruction_set: str,
    seed: int,
) -> None:
    kernels.use_instruction_set(instruction_set)
    k = groups * made.group
    given_ = drawn(n, k, made, torch.Generator().manual_seed(seed))
    weight, packed = dequantize_int4(*given_), pack_int4(*given_)
    assert packed.shape == made.shape(n, k)
    assert int4_format(packed.shape) == made
    assert torch.equal(unpack_int4(packed, n, k), weight)
    assert torch.equal(OPS.unpack_weight(packed, None, n, k, dtype), weight.t().to(dtype))


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 7), (64, 300), (5, 0), (0, 5)])
def test_int8_unpacks_too(instruction_set: str, dtype: torch.dtype, n: int, k: int) -> None:
    kernels.use_instruction_set(instruction_set)
    values, scale = quantize(torch.randn(n, k))
    unpacked = OPS.unpack_weight(OPS.pack_weight(values), scale, n, k, dtype)
    assert torch.equal(unpacked, (values.float() * scale[:, None]).t().to(dtype))


@thorough
@given(
    n=st.integers(1, 20),
    group=st.sampled_from(GROUPS),
    zero_points=st.booleans(),
    shift=st.sampled_from([0.0, 2.0, -2.0]),
    seed=st.integers(0, 1000),
)
def test_quantising_is_within_half_a_step_and_what_rounding_the_scale_moves(
    n: int, group: int, zero_points: bool, shift: float, seed: int
) -> None:
    weight = torch.randn(n, 2 * group, generator=torch.Generator().manual_seed(seed)) + shift
    weight[0, :group] = 0
    values, scales, zeros = quantize_int4(weight, group, zero_points)
    assert values.dtype == torch.int8
    assert -8 <= int(values.min()) <= int(values.max()) <= 7
    assert (zeros is not None) == zero_points
    got = dequantize_int4(values, scales, zeros)
    assert bool((got[0, :group] == 0).all())
    # A group's range is cut into steps. What is outside after rounding the scale is cut off, as is,
    # without zero points, what lies on the other side of the largest by more than 7 steps.
    steps = scales.float().abs().repeat_interleave(group, 1)
    most = 1.0 if not zero_points else 0.5 + 0.5
    assert bool(((got - weight).abs() <= (most + 16 * 2.0**-8) * steps).all())
    inside = values.abs() < 7
    if not zero_points:
        assert bool(((got - weight).abs() <= 0.501 * steps)[inside].all())


def good() -> dict[str, Any]:
    case = make_case(3, [40], 64, Int4Format(32), torch.bfloat16)
    return {"x": case.x, "weights": case.packed, "n": [40], "scales": [], "biases": []}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(3, 32, dtype=torch.bfloat16)}, ValueError, "is not one for k = 32"),
        ({"x": torch.zeros(3, 64, dtype=torch.uint8)}, TypeError, "float32, bfloat16"),
        ({"n": [65]}, ValueError, "and 65 columns"),
        ({"scales": [torch.ones(40)]}, ValueError, "int8 weight needs its scale"),
        ({"weights": [torch.zeros(2, 2, 99, dtype=torch.uint8)]}, ValueError, "groups of 32, 64"),
        ({"weights": [torch.zeros(64, 64, dtype=torch.uint8)]}, ValueError, "blocks, groups"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type, says: str) -> None:
    OPS.linear_packed(**good())
    with pytest.raises(error, match=says):
        OPS.linear_packed(**(good() | change))


def test_weights_must_go_together() -> None:
    formats = Int4Format(32), Int4Format(32, True), Int4Format(32, False, True)
    one, *others = (make_case(1, [32], 64, made, torch.float32) for made in formats)
    for other in others:
        with pytest.raises(ValueError, match="groups alike"):
            OPS.linear_packed(one.x, one.packed + other.packed, [32, 32], [], [])
    with pytest.raises(TypeError, match="float32, bfloat16 or int8"):
        OPS.linear_gemv(one.x, one.packed, [], [])


@pytest.mark.parametrize(("k", "group"), [(33, 32), (96, 64), (64, 16), (0, 32)])
def test_groups_that_do_not_fit_are_refused(k: int, group: int) -> None:
    with pytest.raises(ValueError, match="groups of 32, 64, 128 that divide its k"):
        quantize_int4(torch.zeros(4, k), group)


@pytest.mark.parametrize(
    ("made", "dtype"),
    [(Int4Format(32, True), torch.bfloat16), (Int4Format(32, False, True), torch.float32)],
    ids=str,
)
def test_opcheck(made: Int4Format, dtype: torch.dtype) -> None:
    case = make_case(3, [40], 64, made, dtype, bias=True, residual=True)
    torch.library.opcheck(
        OPS.linear_packed.default, (case.x, case.packed, [40], [], case.biases, case.residual)
    )
    torch.library.opcheck(OPS.unpack_weight.default, (case.packed[0], None, 40, 64, dtype))
