"""What the paged cache cannot serve is refused by name, before anything is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from splitpoint import Config, errors

transformers = pytest.importorskip("transformers")

import splitpoint.integrations.transformers as sp  # noqa: E402

from .models import (  # noqa: E402
    PLAIN,
    deepseek_v3,
    dynamic_rope,
    gpt2,
    gpt_neo,
    llama,
    long_rope,
    made,
    stablelm,
    tokens,
)

ROUNDING = Config(max_size=32, cache_dir="", weights="int8", activations="int8")


@pytest.mark.parametrize("config", [PLAIN, ROUNDING])
def test_a_model_that_does_not_read_the_cache_is_refused(config: Config) -> None:
    model = made(gpt_neo)
    sp.compile(model, config)
    with pytest.raises(errors.UnsupportedModel, match=r"GPTNeo.* not over the paged cache"):
        model(tokens(1, 9))


@pytest.mark.parametrize("sizes", [{"max_sequences": 1}, {"max_cache_tokens": 32}])
def test_a_cache_with_room_for_one_sequence_is_enough(sizes: dict[str, int]) -> None:
    model = made(llama)
    ids = tokens(1, 9)
    expected = model(ids).logits
    sp.compile(model, PLAIN, **sizes)
    assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("make", [long_rope, dynamic_rope])
def test_positions_that_change_the_rope_are_refused(make: Any) -> None:
    model = made(make)
    ids = tokens(1, 70)
    expected = model(ids[:, :64]).logits
    sp.compile(model, PLAIN)
    with torch.no_grad():
        assert_close(model(ids[:, :64]).logits, expected)
        cache = transformers.DynamicCache()
        model(ids[:, :60], past_key_values=cache, use_cache=True)
        with pytest.raises(errors.UnsupportedModel, match=r"70 positions.* 64 on"):
            model(ids[:, 60:], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 60
        found = model(ids[:, 60:64], past_key_values=cache, use_cache=True).logits
        assert_close(found, expected[:, 60:])


def test_the_rope_of_each_kind_of_layer_counts() -> None:
    from splitpoint.integrations.transformers.rope import rope_limit

    kinds = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0},
        "sliding_attention": {"rope_type": "default"},
    }
    config = transformers.PretrainedConfig(max_position_embeddings=128)
    config.rope_parameters = kinds
    found = rope_limit(config)
    assert found is not None
    assert (found.kind, found.positions) == ("dynamic", 128)
    config.rope_parameters = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    assert rope_limit(config) is None


def test_prompts_padded_on_the_right_get_the_tokens_of_the_model() -> None:
    model = made(llama)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    sp.compile(model, PLAIN)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        mask = torch.ones(2, 13, dtype=torch.int64)
        mask[0, 12] = 0
        given = {"attention_mask": mask, "past_key_values": cache, "logits_to_keep": 1}
        with pytest.raises(errors.UnsupportedModel, match="hides the last column"):
            model(ids[:, :1], **given)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_a_compiled_model_goes_on_after_a_call_for_more_than_logits(make: Any, name: str) -> None:
    model = made(make)
    ids = tokens(1, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    sp.compile(model, PLAIN)
    assert torch.equal(model.generate(ids, **options), expected)
    with torch.no_grad():
        assert_close(model(ids, **{name: True}).logits, model(ids).logits)
    assert torch.equal(model.generate(ids, **options), expected)
    sp.undo(model)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (deepseek_v3, "keys of 4 heads of 16 and values of 4 of 24"),
        (stablelm, "not given what its model's forward was"),
    ],
)
def test_what_attention_refuses_is_said_in_its_words(make: Any, words: str) -> None:
    model = made(make)
    sp.compile(model, PLAIN)
    with pytest.raises(errors.UnsupportedModel, match=words):
        model(tokens(1, 9))


def test_a_compiled_model_cannot_be_copied() -> None:
    model = made(llama)
    sp.compile(model, PLAIN)
    with pytest.raises(errors.UnsupportedModel, match="cannot be copied"):
        copy.deepcopy(model)
    assert "forward" not in vars(copy.deepcopy(sp.undo(model)))
