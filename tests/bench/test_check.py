"""The check of outputs: right ones pass, wrong ones are named, before anything is timed."""

from __future__ import annotations

import pytest
import torch

from splitpoint.bench import check
from splitpoint.bench.check import INPUTS, Expected
from splitpoint.bench.inputs import last_logits, random_ids
from splitpoint.config import Activations, Weights
from splitpoint.errors import OutputMismatch
from splitpoint.integrations.transformers.rounding import rounding

from .. import tiny

SIZES = (1, 2, 7)


def test_the_model_agrees_with_itself():
    model = tiny.model()
    assert Expected(model, SIZES).check("eager", last_logits(model)) == 0.0


def test_bf16_is_measured_against_fp32():
    model = tiny.model(torch.bfloat16)
    expected = Expected(model, SIZES)
    error = expected.check("eager", last_logits(model))
    assert 1e-4 < error < 0.05
    assert error == expected.eager_error == expected.limit / 4
    assert model.dtype == torch.bfloat16, "the model itself was converted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong_size", SIZES)
def test_a_forward_that_is_wrong_at_one_size(dtype: torch.dtype, wrong_size: int):
    model = tiny.model(dtype)
    eager = last_logits(model)

    def misreads_the_first_token(ids):
        if ids.shape[1] == wrong_size:
            ids = torch.cat([(ids[:, :1] + 1) % tiny.VOCABULARY, ids[:, 1:]], dim=1)
        return eager(ids)

    expected = Expected(model, SIZES)
    with pytest.raises(OutputMismatch, match=f"bad is wrong at size {wrong_size}"):
        expected.check("bad", misreads_the_first_token)
    others = [size for size in SIZES if size != wrong_size]
    assert expected.check("bad", misreads_the_first_token, others) <= expected.limit


def test_not_a_number_is_wrong():
    model = tiny.model()
    eager = last_logits(model)
    with pytest.raises(OutputMismatch, match=r"bad is wrong at size 1: .*nan"):
        Expected(model, SIZES).check("bad", lambda ids: eager(ids) * torch.nan)


def test_where_a_call_is_slow_one_input_is_tried(monkeypatch: pytest.MonkeyPatch):
    model = tiny.model(torch.bfloat16)
    calls: list[int] = []

    def counted(ids):
        calls.append(ids.shape[1])
        return last_logits(model)(ids)

    expected = Expected(model, SIZES)
    expected.check("eager", counted)
    assert calls == [size for size in SIZES for _ in range(INPUTS)]
    calls.clear()
    monkeypatch.setattr(check, "SLOW_S", -1.0)
    expected.check("eager", counted)
    assert calls == list(SIZES)
    with pytest.raises(OutputMismatch, match="bad is wrong at size 1"):
        expected.check("bad", lambda ids: -last_logits(model)(ids))


@pytest.mark.parametrize(
    ("weights", "activations"), [("int8", None), ("int8", "int8"), ("int4", None)]
)
def test_who_rounds_otherwise_is_compared_with_the_model_as_it_is(
    weights: Weights, activations: Activations | None
):
    model = tiny.model(torch.bfloat16)
    as_it_is = Expected(model, SIZES)
    expected = Expected(model, SIZES, weights, activations, own_rounding=True)
    assert as_it_is.limit / 4 < expected.limit / 2 == expected.eager_error < 0.3
    with rounding(model, weights, activations=activations):
        error = expected.check("ours", last_logits(model))
    assert error == pytest.approx(expected.eager_error)
    assert expected.check("exact", last_logits(model)) == as_it_is.eager_error
    with pytest.raises(OutputMismatch, match="bad is wrong at size 1"):
        expected.check("bad", lambda ids: -last_logits(model)(ids))


def test_inputs_repeat_and_differ():
    assert torch.equal(random_ids(100, 16), random_ids(100, 16))
    assert not torch.equal(random_ids(100, 16, 0), random_ids(100, 16, 1))
    assert random_ids(7, 64).shape == (1, 64)
    assert random_ids(7, 64).max() < 7


def test_logits_are_those_of_the_last_token():
    model = tiny.model()
    ids = random_ids(tiny.VOCABULARY, 5)
    assert torch.allclose(last_logits(model)(ids), model(input_ids=ids).logits[:, -1], atol=1e-6)
