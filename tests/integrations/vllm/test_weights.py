"""Layers in int8 and int4: what is asked for, their kernels, and what is said of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from splitpoint import kernels
from splitpoint.errors import InvalidField, OutputMismatch, UnknownField
from splitpoint.integrations.vllm.choice import OURS, THEIRS, Choice
from splitpoint.integrations.vllm.loading import choices, said, said_of_weights
from splitpoint.integrations.vllm.settings import Settings, parse
from splitpoint.integrations.vllm.shapes import Shape, kind_for
from splitpoint.kernels.reference import quantised_rows
from splitpoint.passes.linear import rounded
from splitpoint.tuning.measure import Budget

# --- what is asked for -----------------------------------------------------------------


@pytest.mark.parametrize("given_", [None, {}, {"weights": None}])
def test_nothing_is_asked_for(given_: object) -> None:
    assert parse(given_) == Settings(None, None)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounding_is_asked_for(weights, activations) -> None:
    given_ = {"weights": weights, "activations": activations}
    assert parse(given_) == Settings(weights, activations)


@pytest.mark.parametrize(
    ("given_", "error", "words"),
    [
        ({"weights": "int3"}, InvalidField, "must be 'int8' or 'int4', got 'int3'"),
        ({"weights": 8}, InvalidField, "must be 'int8' or 'int4', got 8"),
        ({"weights": ["int8"]}, InvalidField, "must be 'int8' or 'int4', got"),
        ({"weights": "int8", "activations": "int4"}, InvalidField, "must be 'int8', got 'int4'"),
        ({"activations": "int8"}, InvalidField, "go with weights in int8 or int4: set both"),
        ({"fuse_allreduce": "no"}, InvalidField, "must be true or false, got 'no'"),
        ({"weight": "int8"}, UnknownField, "has no field 'weight', only weights, activations"),
        ("int8", InvalidField, "must be an object such as {'weights': 'int8'}, got int8"),
    ],
)
def test_what_is_none_is_refused_by_name(given_: object, error: type, words: str) -> None:
    with pytest.raises(error, match="splitpoint of --additional-config") as raised:
        parse(given_)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("weights", "k", "is_head", "kind"),
    [
        (None, 64, False, None),
        (None, 64, True, None),
        ("int8", 50, False, "int8"),
        ("int8", 64, True, "int8"),
        ("int4", 96, False, "int4"),
        ("int4", 50, False, None),
        ("int4", 50, True, "int8"),
    ],
)
def test_what_a_layer_is_rounded_to(weights, k: int, is_head: bool, kind: str | None) -> None:
    assert kind_for(weights, k, is_head) == kind


# --- the kernels -----------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["int8", "int4"]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 40),
    st.integers(1, 70),
    st.sampled_from([32, 64, 96, 128]),
    st.booleans(),
    st.sampled_from([None, "int8"]),
    st.integers(0, 2**32 - 1),
)
def test_both_ways_are_the_product_with_the_rounded_weight(
    weights, dtype, rows, columns, k, has_bias, activations, seed
) -> None:
    kernels.load()
    from splitpoint.integrations.vllm.rounded import Reference, Rounded, by_rows
    from splitpoint.kernels.memory import Streamed

    shape = Shape(columns, k, dtype, weights=weights, activations=activations)
    memory = Streamed()
    torch.manual_seed(seed)
    weight = torch.randn(columns, k).to(dtype)
    x = torch.randn(rows, k).to(dtype)
    bias = torch.randn(columns).to(dtype) if has_bias else None
    made = Rounded(weight, shape, memory)
    values = rounded(weight, weights).double().t()
    offset = 0.0 if bias is None else bias.double()
    expected = x.double() @ values + offset
    if activations:
        of_x, scales = quantised_rows(x)
        other = (of_x.double() * scales.double()[:, None]) @ values + offset
    else:
        other = expected
    near = {torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
    for call, right in (
        (made, expected),
        (made.other, other),
        (by_rows(weight, shape, OURS, memory), expected),
        (by_rows(weight, shape, Choice(16), memory), expected if rows <= 16 else other),
        (by_rows(weight, shape, THEIRS, memory), other),
    ):
        torch.testing.assert_close(
            call(x, None, bias).double(), right, rtol=near, atol=near * math.sqrt(k)
        )
    reference = Reference(weight, shape, [0, columns - 1])
    assert reference.agrees(made(x, None, None), x, is_other=False)
    assert reference.agrees(made.other(x, None, None), x, is_other=True)
    if rows:
        assert not reference.agrees(made(x, None, None) + 0.5, x, is_other=True)


@pytest.mark.parametrize(
    ("weights", "choice", "copies"),
    [("int8", OURS, 1), ("int8", THEIRS, 1), ("int8", Choice(4), 2), ("int4", Choice(4), 1)],
)
def test_only_copies_that_are_read_are_made(weights, choice, copies) -> None:
    kernels.load()
    from splitpoint.integrations.vllm.rounded import Rounded
    from splitpoint.kernels.memory import Streamed

    shape = Shape(64, 64, torch.float32, weights=weights, activations="int8")
    made = Rounded(torch.randn(64, 64), shape, Streamed(), choice)
    assert len({id(each) for each in (*made.weights, *made.beyond)}) == copies


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_graph_holds_the_choice_by_rows(weights, activations) -> None:
    kernels.load()
    from splitpoint.integrations.vllm.rounded import RoundedByRows, by_rows
    from splitpoint.kernels.memory import Streamed

    shape = Shape(40, 64, torch.float32, weights=weights, activations=activations)
    layer = by_rows(torch.randn(40, 64), shape, Choice(4), Streamed())
    assert isinstance(layer, RoundedByRows)
    compiled = torch.compile(lambda x: layer(x * 2, None, None), backend="aot_eager")
    for rows in (2, 3, 9):
        x = torch.randn(rows, 64)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), layer(x * 2, None, None))
    own = layer.rounded
    torch.library.opcheck(
        torch.ops.splitpoint_vllm.linear_rounded.default,
        (torch.randn(3, 64), own.weights[0], own.beyond[0], own.scale, 40, None, 2, own.rounds_x),
    )


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_both_ways_are_measured(weights, activations) -> None:
    kernels.load()
    from splitpoint.integrations.vllm.measuring import ROWS, measure

    shape = Shape(100, 64, torch.bfloat16, weights=weights, activations=activations)
    tensors = {shape: [torch.randn(100, 64, dtype=torch.bfloat16)]}
    found = measure(tensors, _not_called, Budget(20.0))[shape]
    assert tuple(found) == ROWS
    assert all(0 < seconds < 1 for pair in found.values() for seconds in pair)


def _not_called(layer: nn.Module, remove_weight: bool) -> None:
    raise AssertionError("vLLM's own kernel is not asked about rounded weights")


@pytest.mark.parametrize("wrong", [{"__call__"}, {"other"}, {"__call__", "other"}])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_a_way_that_is_wrong_is_not_taken(wrong: set[str], activations, monkeypatch) -> None:
    kernels.load()
    from splitpoint.integrations.vllm import measuring, rounded

    for name in wrong:
        right = getattr(rounded.Rounded, name)
        monkeypatch.setattr(rounded.Rounded, name, lambda *args, call=right: call(*args) * 1.1)
    shape = Shape(64, 32, torch.float32, weights="int8", activations=activations)
    tensors = {shape: [torch.randn(64, 32)]}
    if len(wrong) == 2:
        with pytest.raises(OutputMismatch, match="no kernel for 64x32 fp32 in int8 is right"):
            measuring.measure(tensors, _not_called, Budget(20.0))
        return
    found = measuring.measure(tensors, _not_called, Budget(20.0))
    chosen = choices(found, {shape: 1}, spare=0)[shape]
    assert chosen == (THEIRS if wrong == {"__call__"} else OURS)


# --- choices, and what is said ---------------------------------------------------------


def test_one_form_serves_all_rows_without_more_memory() -> None:
    times = {1: (1.0, 2.0), 8: (1.0, 2.0), 32: (2.0, 1.0)}
    body = Shape(64, 64, torch.float32, weights="int4")
    head = Shape(64, 64, torch.float32, stays=True, weights="int8")
    chosen = choices({body: times, head: {}}, {body: 2, head: 1}, spare=0)
    assert chosen == {body: Choice(16), head: OURS}
    assert said(chosen, {body: 2, head: 1}) == (
        "1 of 64x64 fp32 in int8 of an embedding any rows, "
        "2 of 64x64 fp32 in int4 up to 16 rows, unpacked for more"
    )
    assert THEIRS.said(body.other) == "unpacked at each call"


def test_what_rounds_x_must_be_worth_it_and_have_room_for_its_copy() -> None:
    little, much = {8: (1.0, 0.93)}, {8: (1.0, 1.0), 32: (2.0, 1.0)}
    in_8 = Shape(64, 64, torch.float32, weights="int8", activations="int8")
    in_4 = Shape(64, 64, torch.float32, weights="int4", activations="int8")
    assert choices({in_8: little}, {in_8: 1}, spare=1 << 20) == {in_8: OURS}
    assert choices({in_8: much, in_4: much}, {in_8: 2, in_4: 1}, spare=2 * 64 * 64) == {
        in_8: Choice(16),
        in_4: Choice(16),
    }
    tight = choices({in_8: much, in_4: much}, {in_8: 2, in_4: 1}, spare=2 * 64 * 64 - 1)
    assert tight == {in_8: THEIRS, in_4: Choice(16)}
    assert said(tight, {in_8: 2, in_4: 1}) == (
        "1 of 64x64 fp32 in int4 up to 16 rows, with x in int8 for more, "
        "2 of 64x64 fp32 in int8 with x in int8"
    )


def test_what_stays_is_said() -> None:
    body = Shape(64, 64, torch.bfloat16, weights="int4")
    other = Shape(64, 50, torch.bfloat16)
    head = Shape(96, 64, torch.bfloat16, stays=True, weights="int8")
    assert said_of_weights("int4", {body: 4, other: 2, head: 1}, {"FusedMoE": 3}) == (
        "weights rounded: 4 layers in int4, 1 layers in int8; heads are in int8; left as they "
        "are: 2 of 64x50 bf16 (int4 needs inputs in multiples of 32), "
        "3 FusedMoE (no matrix in bf16 or fp32)"
    )
    assert said_of_weights("int8", {}, {}) == "weights rounded: none; left as they are: none"
