"""The check of outputs: right ones pass, wrong ones are named, before anything is timed."""

from __future__ import annotations

import pytest
import torch

from splitpoint.bench.check import Expected
from splitpoint.bench.inputs import last_logits, random_ids
from splitpoint.errors import OutputMismatch

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


def test_inputs_repeat_and_differ():
    assert torch.equal(random_ids(100, 16), random_ids(100, 16))
    assert not torch.equal(random_ids(100, 16, 0), random_ids(100, 16, 1))
    assert random_ids(7, 64).shape == (1, 64)
    assert random_ids(7, 64).max() < 7


def test_logits_are_those_of_the_last_token():
    model = tiny.model()
    ids = random_ids(tiny.VOCABULARY, 5)
    assert torch.allclose(last_logits(model)(ids), model(input_ids=ids).logits[:, -1], atol=1e-6)
