"""A decoding loop of one's own over transformers' StaticCache, which is initialised before."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import splitpoint
from splitpoint import Config, errors

from .. import tiny

IDS = torch.tensor([[3, 1, 4, 1, 5]])
DIMS = {"input_ids": 1, "position_ids": 1}


def cache_of(model) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(1, 2, tiny.HIDDEN // 4, torch.float32, torch.device("cpu"))
    return cache


def decoded(step, cache: StaticCache, ids: torch.Tensor = IDS, count: int = 6) -> list[int]:
    found, places = [], torch.arange(ids.shape[1])
    with torch.no_grad():
        for _ in range(count):
            out = step(input_ids=ids, position_ids=places[None], past_key_values=cache)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(ids))
            places = places[-1:] + 1
    return found


def test_each_cache_is_captured_until_there_are_too_many():
    model = tiny.model()
    expected = decoded(model, cache_of(model))
    config = Config(max_size=8, backend="eager", cache_dir="", max_signatures=2)
    compiled = splitpoint.compile(model, config, dynamic_dims=DIMS)
    first, second, third = (cache_of(model) for _ in range(3))
    assert decoded(compiled, first) == expected
    assert decoded(compiled, second) == expected
    captures = compiled.stats().captures
    for cache in (second, first):
        cache.reset()
        assert decoded(compiled, cache) == expected
    assert compiled.stats().captures == captures
    with pytest.raises(errors.TooManySignatures) as error:
        decoded(compiled, third)
    assert "past_key_values" in str(error.value)
    assert " is another cache: " in str(error.value)
    assert "splitpoint.integrations.transformers.compile(model)" in str(error.value)


def test_where_there_may_be_one_kind_the_message_is_the_same():
    model = tiny.model()
    config = Config(max_size=8, backend="eager", cache_dir="", max_signatures=1)
    compiled = splitpoint.compile(model, config, dynamic_dims=DIMS)
    decoded(compiled, cache_of(model), count=2)
    with pytest.raises(errors.WrongValue, match=r"reset\(\), or call splitpoint\.integrations"):
        decoded(compiled, cache_of(model))
