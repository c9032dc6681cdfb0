"""transformers' generate over a compiled model: the same tokens, whatever way it is called."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from splitpoint import Config, errors
from splitpoint.models.catalogue import load

transformers = pytest.importorskip("transformers")

import splitpoint.integrations.transformers as sp  # noqa: E402
from splitpoint.integrations.transformers.rounding import rounding  # noqa: E402

from .models import MODELS, PLAIN, gemma3, gpt2, llama, made, tokens  # noqa: E402

Way = Callable[[Any], torch.Tensor]


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, **options)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :7] = 0
    mask[2, :3] = 0
    return tokens(3, 20, 1), mask


def greedy(model: Any) -> torch.Tensor:
    return generate(model, tokens(1, 13))


def batch_with_padding(model: Any) -> torch.Tensor:
    ids, mask = padded()
    return generate(model, ids, attention_mask=mask)


def sampling(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return generate(model, tokens(2, 9), do_sample=True, top_k=20)


def beams(model: Any) -> torch.Tensor:
    ids, mask = padded()
    return generate(model, ids, attention_mask=mask, num_beams=4)


def several_of_each(model: Any) -> torch.Tensor:
    torch.manual_seed(4)
    return generate(model, tokens(2, 9), do_sample=True, num_return_sequences=3)


def long_prompt(model: Any) -> torch.Tensor:
    return generate(model, tokens(2, 150, 2))


def candidates_from_the_prompt(model: Any) -> torch.Tensor:
    return generate(model, tokens(1, 5).repeat(1, 4), prompt_lookup_num_tokens=4)


def turns_on_one_cache(model: Any) -> torch.Tensor:
    cache = transformers.DynamicCache()
    first = generate(model, tokens(1, 13), max_new_tokens=5, past_key_values=cache)
    other = generate(model, tokens(1, 30, 5))  # another live cache meanwhile
    more = torch.cat([first, tokens(1, 4, 6)], 1)
    return torch.cat([generate(model, more, past_key_values=cache), other], 1)


def prefix_that_is_copied(model: Any) -> torch.Tensor:
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(tokens(1, 70, 7), past_key_values=cache, use_cache=True)
    results = []
    for seed in (8, 9):
        whole = torch.cat([tokens(1, 70, 7), tokens(1, 6, seed)], 1)
        results.append(generate(model, whole, past_key_values=copy.deepcopy(cache)))
    return torch.cat(results, 1)


def static_cache(model: Any) -> torch.Tensor:
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    return generate(model, tokens(1, 13), past_key_values=cache, disable_compile=True)


def without_cache(model: Any) -> torch.Tensor:
    return generate(model, tokens(2, 9), max_new_tokens=6, use_cache=False)


WAYS = (
    greedy,
    batch_with_padding,
    sampling,
    beams,
    several_of_each,
    long_prompt,
    candidates_from_the_prompt,
    turns_on_one_cache,
    prefix_that_is_copied,
    static_cache,
    without_cache,
)


@pytest.mark.parametrize("make", MODELS)
def test_tokens_are_those_of_the_model(make: Any) -> None:
    model = made(make)
    ways = WAYS if make is llama else [way for way in WAYS if way not in (static_cache,)]
    expected = [way(model) for way in ways]
    assert sp.compile(model, PLAIN) is model
    for way, tokens_ in zip(ways, expected, strict=True):
        found = way(model)
        assert torch.equal(found, tokens_), f"{way.__name__}: {found.tolist()}"
    decoder = sp.decoder_of(model)
    gc.collect()
    assert decoder.cache.free_tokens == decoder.cache.capacity  # all caches were given back
    sp.undo(model)
    assert torch.equal(greedy(model), expected[0])
    assert "forward" not in vars(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gemma3])
def test_compiled_by_inductor(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(make, dtype)
    ids, mask = padded()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    config = Config(max_size=64, split_points=[8], compile_sizes=[1], cache_dir=str(tmp_path))
    for start in range(2):
        sp.compile(model, config)
        decoder = sp.decoder_of(model)
        with torch.no_grad():
            found = model(ids, attention_mask=mask).logits
        kept = mask.bool()
        assert_close(
            found[kept],
            expected[kept],
            **({} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}),
        )
        batch_with_padding(model)
        made_now = decoder.body.stats(), decoder.head.stats()
        for way in (long_prompt, greedy, beams, turns_on_one_cache):
            way(model)
        # Whatever the lengths, nothing is captured or compiled any more.
        now = decoder.body.stats(), decoder.head.stats()
        for before, after in zip(made_now, now, strict=True):
            assert (after.captures, after.compilations, after.loads) == (
                before.captures,
                before.compilations,
                before.loads,
            )
        assert all((each.compilations == 0) is bool(start) for each in now)
        sp.undo(model)


def test_a_model_with_weights_of_its_own_goes_on() -> None:
    model = made(llama)
    sp.compile(model, PLAIN)
    greedy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    found = greedy(model)
    sp.undo(model)
    assert torch.equal(found, greedy(model))


def test_a_call_that_needs_more_than_logits_runs_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = made(llama)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids, labels=ids, output_attentions=False).loss
        sp.compile(model, PLAIN)
        assert_close(model(ids, labels=ids).loss, expected)
        assert_close(model(ids, labels=ids).loss, expected)
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
        embedded = model.model.embed_tokens(ids)
        assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert [s.split(": ")[-1] for s in said if s.startswith("a call of")] == [
        "it asks for a loss",
        "it asks for output_hidden_states",
        "it passes inputs_embeds",
    ]


def test_gradients_are_the_models() -> None:
    model = made(llama).requires_grad_(True)
    sp.compile(model, PLAIN)
    model(tokens(1, 5)).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_a_cache_that_the_model_filled_stays_with_it() -> None:
    model = made(llama)
    ids = tokens(1, 13)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache, use_cache=True)
        expected = model(ids).logits[:, -4:]
        sp.compile(model, PLAIN)
        assert_close(model(ids[:, 9:], past_key_values=cache, use_cache=True).logits, expected)


def test_what_does_not_fit_is_refused_and_the_next_call_is_right() -> None:
    model = made(llama)
    expected = greedy(model)
    sp.compile(model, PLAIN, max_cache_tokens=256, max_sequences=4)
    with pytest.raises(errors.CacheFull, match="max_cache_tokens"):
        generate(model, tokens(1, 300))
    assert torch.equal(greedy(model), expected)
    with pytest.raises(errors.CacheFull, match="max_sequences"):
        generate(model, tokens(5, 4))
    gc.collect()
    assert torch.equal(greedy(model), expected)


def test_a_call_that_is_stopped_leaves_the_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made(llama)
    ids = tokens(1, 100)
    with torch.no_grad():
        expected = model(ids).logits
    sp.compile(model, PLAIN)
    decoder = sp.decoder_of(model)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        body, calls = decoder.body, []

        def stops(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return body(*args)

        monkeypatch.setattr(decoder, "body", stops)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 20:], past_key_values=cache, use_cache=True)
        monkeypatch.undo()
        assert cache.get_seq_length() == 20
        found = model(ids[:, 20:], past_key_values=cache, use_cache=True).logits
    assert_close(found, expected[:, 20:])


def test_masks_that_do_not_fit_the_cache_are_refused() -> None:
    model = made(llama)
    sp.compile(model, PLAIN)
    cache = transformers.DynamicCache()
    ids = tokens(2, 9)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        mask = torch.ones(2, 10, dtype=torch.int64)
        mask[0, 3] = 0
        with pytest.raises(errors.UnsupportedModel, match="hides other tokens"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
        with pytest.raises(errors.UnsupportedModel, match="columns"):
            model(ids[:, :1], attention_mask=mask[:, :4], past_key_values=cache, use_cache=True)
        with pytest.raises(errors.UnsupportedModel, match="2 sequences"):
            model(ids[:1, :1], past_key_values=cache, use_cache=True)


def test_an_assistant_and_a_pipeline() -> None:
    model, assistant = made(llama), made(llama)
    ids = tokens(1, 13)
    expected = generate(model, ids)
    sp.compile(model, PLAIN)
    sp.compile(assistant, PLAIN)
    found = generate(model, ids, assistant_model=assistant)
    assert torch.equal(found, expected)


def test_other_models_are_refused_by_name() -> None:
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for model in (bert, t5, made(llama, torch.float64)):
        with pytest.raises(errors.UnsupportedModel, match=type(model).__name__[:4]):
            sp.compile(model)
    model = made(llama)
    with pytest.raises(errors.ConfigError, match="not compiled"):
        sp.undo(model)
    sp.compile(model, PLAIN)
    with pytest.raises(errors.ConfigError, match="compiled already"):
        sp.compile(model, PLAIN)


ROUNDING = Config(max_size=32, cache_dir="", weights="int8", activations="int8")


@pytest.mark.parametrize("config", [PLAIN, ROUNDING])
def test_attention_that_sees_other_keys_is_found_out(config: Config) -> None:
    model = made(gemma3)
    sp.compile(model, config)
    for layer in sp.decoder_of(model).body.module.inner.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(errors.UnsupportedModel, match="other logits"):
        greedy(model)


def test_tokens_are_those_of_the_model_with_rounded_weights() -> None:
    model = made(gpt2)
    plain = greedy(model)
    with rounding(model, "int4"):
        expected = greedy(model)
    assert torch.equal(greedy(model), plain)  # its own weights are back
    sp.compile(model, Config(max_size=32, cache_dir="", weights="int4"))
    assert torch.equal(greedy(model), expected)
    decoder = sp.decoder_of(model)
    (body,), (head,) = decoder.body.plan.entries, decoder.head.plan.entries
    assert {name.split("_")[0] for name in body.linear.values()} == {"int4"}
    assert {name.split("_")[0] for name in head.linear.values()} == {"int8"}


@pytest.mark.slow
def test_a_model_whose_roundings_add_up_is_served() -> None:
    """SmolLM2 in bfloat16, whose logits are off by a third of their spread by activations alone."""
    model, _ = load("smollm2", torch.bfloat16)
    sp.compile(model, Config(max_size=32, cache_dir="", weights="int4", activations="int8"))
    assert len(greedy(model)[0]) > 13


@pytest.mark.slow
def test_a_batch_invariant_sequence_has_the_same_logits_beside_others():
    """Left-padded beside longer ones too, since padding is no token of a step."""
    model = made(llama, torch.bfloat16)
    sp.compile(model, Config(max_size=256, batch_invariant=True))
    prompts = [tokens(1, length, length)[0] for length in (5, 9, 20)]

    def answer(asked: list[torch.Tensor]) -> list[torch.Tensor]:
        longest = max(map(len, asked))
        ids = torch.zeros(len(asked), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(asked):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        given = generate(
            model, ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True
        )
        return list(torch.stack(given.logits, 1))

    alone = [answer([prompt])[0] for prompt in prompts]
    for asked in ([0, 1, 2], [2, 0], [1, 1, 1, 1, 2, 0, 0]):
        for index, logits in zip(asked, answer([prompts[i] for i in asked]), strict=True):
            assert torch.equal(logits, alone[index])
