"""What the paged cache cannot serve is refused by name, before anything is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from splitpoint import Config, errors

transformers = pytest.importorskip("transformers")

import splitpoint.integrations.transformers as sp  # noqa: E402

from .models import PLAIN, dynamic_rope, gpt_neo, llama, long_rope, made, tokens  # noqa: E402

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
