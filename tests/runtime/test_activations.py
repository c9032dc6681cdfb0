"""`Config.activations`: layers over weights of 8 or 4 bits that round what they are given."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitpoint import Config, compile, kernels
from splitpoint.errors import InvalidField, NothingToRound
from splitpoint.kernels.bounds import ROUNDOFF, Expected
from splitpoint.kernels.int4 import INT4_FORMATS, Int4Format
from splitpoint.kernels.layout import quantize
from splitpoint.kernels.reference import quantised_rows
from splitpoint.passes import linear
from splitpoint.passes.linear import LAYOUTS, VARIANTS, rounded
from splitpoint.passes.linear_sites import LinearShape, find
from splitpoint.ranges import Range
from splitpoint.runtime.freed_weights import is_freed
from splitpoint.tuning.linear import LinearTuner
from tests.passes.test_linear import Layered, piece_of
from tests.runtime import test_packed_linear as packed
from tests.runtime.test_quantised import PLAN, SIZES, make, reference, x

ASKED: dict[str, Any] = PLAN | {"weights": "int8", "activations": "int8"}

LAST = "64->300"


@pytest.fixture
def large_sizes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 8, and only there, kernels that round x are alone worth measuring, so that the choice
    does not depend on the machine."""
    for name in (
        "int8", "int8_unpacked", "packed", "unpacked", "int8_dynamic", "dynamic",
        "int4", "int4_unpacked", "int4_dynamic", "dynamic_int4",
    ):  # fmt: skip
        variant = VARIANTS[name]
        rounds = bool(variant.activations)
        some = dataclasses.replace(variant, promises=lambda r, rounds=rounds: (r.end > 8) == rounds)
        monkeypatch.setitem(VARIANTS, name, some)


class Rounding(nn.Module):
    """The layers of a model in float64, with weights rounded to int8 and so what they are given."""

    def __init__(self, module: Any, inputs: bool = True) -> None:
        super().__init__()
        self.module, self.inputs = module.double(), inputs
        for name, weight in module.named_parameters():
            if weight.dim() == 2:
                turned = name == "turned"
                values = rounded(weight.t() if turned else weight, "int8").double()
                weight.data = values.t() if turned else values
        for each in module.modules():
            if isinstance(each, nn.Linear) and inputs:
                each.register_forward_pre_hook(lambda _, given: self.taken(given[0]))

    def taken(self, given: Tensor) -> Tensor:
        values, scale = quantised_rows(given)
        return values.double() * scale.double()[:, None]

    def forward(self, given: Tensor) -> Tensor:
        made: Tensor = self.module(given.double())
        return made


def off(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("large_sizes_round")
@pytest.mark.parametrize("runner", ["native", "python"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_ranges_that_gain_round_what_layers_are_given(dtype: torch.dtype, runner: str) -> None:
    module = make(dtype)
    compiled = compile(module, Config(**ASKED, runner=runner))
    plain, rounding = Rounding(make(dtype), inputs=False), Rounding(make(dtype))
    for size in SIZES:
        y, given = compiled(x(size, dtype)), x(size, dtype)
        weights_alone = off(y, plain(given))
        if size <= 8:
            assert weights_alone < (1e-6 if dtype == torch.float32 else 0.02)
        else:
            # What is rounded once more differs a little from step to step, in either reference.
            assert 2e-3 < weights_alone < 0.05
            assert off(y, rounding(given)) < 0.03
    small, large = compiled.plan.entries
    assert small.note == "no activations in int8: it is not faster"
    assert set(large.linear.values()) == {"int8_dynamic"}
    assert large.note.startswith("activations in int8 (within 1/254 of a row's largest value): ")
    assert LAST in large.note
    assert "int8_dynamic" in str(compiled.plan)


@pytest.mark.usefixtures("large_sizes_round")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_computes_what_the_reference_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(192, 300).to(dtype).requires_grad_(False)
    compiled = compile(layer, Config(**ASKED))
    values, scale = quantize(layer.weight)
    for size in SIZES:
        expected = Expected.of(x(size, dtype), [values], [scale], [layer.bias], rounds_x=size > 8)
        assert expected.exceeded([compiled(x(size, dtype))]) <= 1


@pytest.mark.usefixtures("large_sizes_round")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layers_over_four_packed_bits_compute_what_the_reference_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = packed.int4(300, 192, Int4Format(64), bias=True).to(dtype).eval().requires_grad_(False)
    compiled = compile(layer, Config(**PLAN, activations="int8"))
    weight = layer.weight(torch.float32)
    for size in SIZES:
        off_by = [ROUNDOFF[dtype] * weight.abs()] if size <= 8 else []
        expected = Expected.of(
            x(size, dtype), [weight], (), [layer.bias], off=off_by, rounds_x=size > 8
        )
        assert expected.exceeded([compiled(x(size, dtype))]) <= 1
    assert [*compiled.plan.entries[1].linear.values()] == ["dynamic_int4"]


@pytest.mark.usefixtures("large_sizes_round")
@pytest.mark.parametrize("runner", ["native", "python"])
def test_weights_rounded_to_four_bits_have_it_too(runner: str) -> None:
    compiled = compile(make(), Config(**ASKED | {"weights": "int4"}, runner=runner))
    weights_alone = reference(make(), "int4")
    for size in SIZES:
        moved = off(compiled(x(size)), weights_alone(x(size).double()))
        assert moved < 1e-5 if size <= 8 else 2e-3 < moved < 0.05
    assert {*compiled.plan.entries[1].linear.values()} >= {"int4_dynamic", "int8_dynamic"}


@pytest.mark.usefixtures("large_sizes_round")
def test_layers_over_packed_weights_round_too() -> None:
    torch.manual_seed(0)
    layer = packed.int8(300, 192, bias=True).eval().requires_grad_(False)
    config = Config(**PLAN, activations="int8")
    compiled = compile(layer, config)
    weight = layer.weight(torch.float32)
    values = (weight / layer.scale[:, None]).round()
    for size in SIZES:
        expected = Expected.of(x(size), [values], [layer.scale], [layer.bias], rounds_x=size > 8)
        assert expected.exceeded([compiled(x(size))]) <= 1
    assert [*compiled.plan.entries[1].linear.values()] == ["dynamic"]


def test_int8_with_a_factor_a_column_rounds_too() -> None:
    kernels.load()
    forms = [
        lambda m, x: F.linear(x, m.int8.to(x.dtype)) * m.scale,
        lambda m, x: (x @ m.int8_turned.to(x.dtype)) * m.scale,
    ]
    for form in forms:
        model, given = Layered(form).eval(), torch.randn(5, 64)
        model.register_buffer("int8_turned", model.int8.t().contiguous())
        piece, values, bound = piece_of(model, given)
        (site,) = find(piece, bound)
        prepared = linear.rewrite(piece, bound, {site.shape: "dynamic"})
        inputs = [LAYOUTS[layout].pack(values[i].detach()) for i, layout in prepared.sources]
        (made,) = prepared.piece.graph_module(*([5] if piece.takes else []), *inputs)
        expected = Expected.of(given, [model.int8], [model.scale], rounds_x=True, exact_sums=True)
        assert expected.exceeded([made]) <= 1


@pytest.mark.usefixtures("large_sizes_round")
def test_what_is_updated_and_freed_is_rounded_anew() -> None:
    module = make()
    compiled = compile(module, Config(**ASKED, free_original_weights=True))
    compiled(x(9))
    assert is_freed(module.down.weight)
    other = make(seed=1)
    module.load_state_dict(other.state_dict())
    assert off(compiled(x(9)), Rounding(other)(x(9))) < 0.03


@pytest.mark.usefixtures("large_sizes_round")
def test_a_row_that_is_not_finite_stays_alone() -> None:
    compiled = compile(make(), Config(**ASKED))
    given = x(40)
    before = compiled(given)
    given[3, 5] = math.inf
    after = compiled(given)
    assert after[3].isnan().all()
    assert torch.equal(after[:3], before[:3])
    assert torch.equal(after[4:], before[4:])


@pytest.mark.usefixtures("large_sizes_round")
def test_a_start_from_the_store_rounds_alike(tmp_path: Path) -> None:
    results, stats = {}, {}
    for name in ("once", "again"):
        compiled = compile(make(), Config(**ASKED | {"cache_dir": str(tmp_path)}))
        results[name] = compiled(x(40))
        stats[name] = compiled.stats()
    assert torch.equal(results["once"], results["again"])
    assert stats["again"].compilations == 0


@pytest.mark.parametrize("held", ["int8", None])
def test_it_is_batch_invariant(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitpoint.tuning.linear.WORTH_ROUNDING", 0.0)  # wherever it is right
    asked = ASKED | {"weights": held, "split_points": [], "batch_invariant": True}
    model = make() if held else packed.int8(512, 192, bias=True).eval().requires_grad_(False)
    compiled = compile(model, Config(**asked))
    whole = compiled(x(64))
    for rows in (slice(0, 1), slice(5, 12), slice(12, 64)):
        assert torch.equal(compiled(x(64)[rows].contiguous()), whole[rows])
    assert "int8_dynamic" in str(compiled.plan) if held else "dynamic" in str(compiled.plan)


SHAPE = LinearShape(columns=(512,), k=512, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("seconds", "activations", "chosen"),
    [
        ({"int8": 1.0, "int8_unpacked": 2.0, "int8_dynamic": 0.5}, "int8", "int8_dynamic"),
        ({"int8": 1.0, "int8_unpacked": 2.0, "int8_dynamic": 0.5}, "", "int8"),
        ({"int8": 1.0, "int8_unpacked": 2.0, "int8_dynamic": 0.95}, "int8", "int8"),
        ({"int8": 3.0, "int8_unpacked": 2.0, "int8_dynamic": 1.9}, "int8", "int8_unpacked"),
        ({"int8": 3.0, "int8_unpacked": 2.0, "int8_dynamic": math.inf}, "int8", "int8_unpacked"),
        (
            {"int8": math.inf, "int8_unpacked": math.inf, "int8_dynamic": 1.0},
            "int8",
            "int8_dynamic",
        ),
    ],
)
def test_it_is_chosen_where_it_is_faster_by_more_than_its_error_is_worth(
    seconds: dict[str, float], activations: str, chosen: str
) -> None:
    tuner = LinearTuner(threads=1)
    tuner._seconds[SHAPE, 64] = seconds  # as if they had been measured
    found = tuner.choose(SHAPE, Range(64, 64), weights="int8", activations=activations)
    assert found == chosen


@pytest.mark.parametrize(("rounding", "chosen"), [(0.5, "int8_dynamic"), (0.95, "int8_invariant")])
def test_of_kernels_whose_rows_stand_alone_too(rounding: float, chosen: str) -> None:
    tuner = LinearTuner(threads=1)
    tuner._seconds[SHAPE, 64] = {"int8_invariant": 1.0, "int8_dynamic": rounding}
    found = tuner.choose(
        SHAPE, Range(64, 64), weights="int8", activations="int8", batch_invariant=True
    )
    assert found == chosen


@pytest.mark.parametrize("instruction_set", ["avx512_bf16", "avx2", "portable"])
@pytest.mark.parametrize("name", ["int8_dynamic", "dynamic", "int4_dynamic", "dynamic_int4"])
def test_it_is_right_as_the_tuner_sees_it(name: str, instruction_set: str) -> None:
    if instruction_set not in kernels.instruction_sets():
        pytest.skip("not on this CPU")
    kernels.use_instruction_set(instruction_set)
    int8, k = name == "dynamic", 192 if "int4" in name else 130
    shapes = [
        LinearShape((70, 33), 96, torch.bfloat16, bias=True, int8=int8),
        LinearShape((64, 64), k, torch.float32, activation="silu", gated=True, int8=int8),
        LinearShape((64,), 96, torch.float32, residual=True, transposed=True, int8=int8),
    ]
    if name == "dynamic_int4":
        shapes = [
            LinearShape((64,), 128, dtype, packed=str(made))
            for made in INT4_FORMATS
            for dtype in (torch.float32, torch.bfloat16)
        ]
    if int8:
        shapes.append(LinearShape((64,), 33, torch.float32, int8=True, packed="int8"))
    try:
        tuner = LinearTuner(threads=1)
        for shape in shapes:
            for rows in (1, 20):
                seconds = tuner.seconds(shape, rows, [name])
                assert seconds is not None
                assert seconds[name] < math.inf
    finally:
        kernels.use_instruction_set("best")


def test_one_that_does_not_round_is_not_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels.load()
    exact = dataclasses.replace(VARIANTS["int8"], activations="int8", name="int8_dynamic")
    monkeypatch.setitem(VARIANTS, "int8_dynamic", exact)
    seconds = LinearTuner(threads=1).seconds(SHAPE, 20, ["int8_dynamic"])
    assert seconds == {"int8_dynamic": math.inf}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"activations": "int4"}, "activations must be one of 'int8', got 'int4'"),
        ({"weights": None, "linear": "inductor"}, "needs linear='auto', got 'inductor'"),
        ({"weights": None, "backend": "eager"}, "needs backend='inductor', got 'eager'"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidField, match=said):
        Config(**ASKED | given)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(
        NothingToRound, match="the model has none\ngive weights='int8' or 'int4' beside it"
    ):
        compile(make(), Config(**ASKED | {"weights": None}))(x(4))
    with pytest.raises(NothingToRound, match="in float32 or bfloat16"):
        compile(make(torch.float64), Config(**ASKED))(x(4, torch.float64))


def test_the_last_layer_is_int8_beside_int4_and_may_be_all_there_is_to_round() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.Linear(129, 64))
    compiled = compile(
        model.eval().requires_grad_(False),
        Config(max_size=8, weights="int4", activations="int8", cache_dir=""),
    )
    given = torch.randn(3, 33)
    values, scale = quantize(model[1].weight)
    rounded = torch.nn.functional.linear(model[0](given), values.float() * scale[:, None])
    # Where x is rounded too, by at most a 254th of a row's largest value, of which there are 129.
    torch.testing.assert_close(compiled(given), rounded + model[1].bias, rtol=0, atol=0.02)
    assert "int8" in str(compiled.plan)
