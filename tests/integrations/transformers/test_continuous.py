"""transformers' continuous batching over a compiled model."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from splitpoint import Config, errors

transformers = pytest.importorskip("transformers")

import splitpoint.integrations.transformers as sp  # noqa: E402

from .models import PLAIN, gemma3, llama, long_rope, made, tokens  # noqa: E402

PROMPTS = [tokens(1, count, count)[0].tolist() for count in (8, 5, 88, 36, 1, 31, 32, 33, 64, 200)]


def run(model: Any, prompts: Any = PROMPTS, batch_tokens: int = 128, **options: Any) -> list[Any]:
    settings = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=batch_tokens)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    config = transformers.GenerationConfig(eos_token_id=-1, **options)
    found = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=settings
    )
    return [found[name].generated_tokens for name in sorted(found, key=lambda n: (len(n), n))]


@pytest.mark.parametrize("batch_tokens", [48, 128])
def test_each_request_gets_the_tokens_that_it_gets_alone(batch_tokens: int) -> None:
    model = made(llama)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected.append(whole[0, len(prompt) :].tolist())
    sp.compile(model, PLAIN)  # 64 tokens at once at most, fewer than a batch may have
    assert run(model, batch_tokens=batch_tokens) == expected
    calls = sum(sp.decoder_of(model).body.stats().dispatches.values())
    assert run(model, batch_tokens=batch_tokens) == expected
    assert sum(sp.decoder_of(model).body.stats().dispatches.values()) > calls
    gc.collect()
    cache = sp.decoder_of(model).cache
    assert cache.free_tokens == cache.capacity
    sp.undo(model)
    assert run(model, batch_tokens=batch_tokens) == expected


def test_forks_of_a_request_have_its_tokens() -> None:
    model = made(llama)
    sp.compile(model, PLAIN)
    # Sampled from one token: forks copy what they hold, and go on as the request itself would.
    forked = run(model, PROMPTS[2:4], do_sample=True, top_k=1, num_return_sequences=3)
    alone = run(model, PROMPTS[2:4])
    assert sorted(map(tuple, forked)) == sorted(tuple(each) for each in alone for _ in range(3))


def test_layers_of_several_kinds_are_left_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model = made(gemma3)
    expected = run(model, PROMPTS[:2])
    sp.compile(model, PLAIN)
    assert run(model, PROMPTS[:2]) == expected
    assert "runs uncompiled" in caplog.text


def test_a_cache_that_is_full_says_so() -> None:
    model = made(llama)
    sp.compile(model, PLAIN, max_cache_tokens=64)
    settings = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=128)
    config = transformers.GenerationConfig(eos_token_id=-1, max_new_tokens=12, do_sample=False)
    (failed,) = model.generate_batch(
        PROMPTS[2:3], generation_config=config, continuous_batching_config=settings
    ).values()
    assert "max_cache_tokens" in str(failed.error)
    assert failed.generated_tokens == []


def test_positions_that_change_the_rope_are_refused() -> None:
    model = made(long_rope)
    settings = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=128)
    config = transformers.GenerationConfig(eos_token_id=-1, max_new_tokens=12, do_sample=False)
    expected = run(model, PROMPTS[:2])
    sp.compile(model, PLAIN)
    assert run(model, PROMPTS[:2]) == expected
    (failed,) = model.generate_batch(
        PROMPTS[2:3], generation_config=config, continuous_batching_config=settings
    ).values()
    assert "'longrope'" in str(failed.error)


def test_compiled_by_inductor_nothing_is_compiled_after_the_first_batch() -> None:
    model = made(llama)
    expected = run(model)
    sp.compile(model, Config(max_size=64, split_points=[8], compile_sizes=[1], cache_dir=""))
    assert run(model) == expected
    decoder = sp.decoder_of(model)
    before = [part.stats().compilations for part in (decoder.body, decoder.head)]
    assert run(model, PROMPTS[::-1]) == expected[::-1]
    assert [part.stats().compilations for part in (decoder.body, decoder.head)] == before


def test_memory_that_transformers_would_move_is_refused() -> None:
    from splitpoint.integrations.transformers.continuous import _Refused

    with pytest.raises(errors.UnsupportedModel, match="cpu_offload_space"):
        _Refused().index_select(0, None)
