"""The demo's own parts; `make demo` is the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from splitpoint import Config, compile
from splitpoint.bench.demo import NEW_TOKENS, chat_ids, generate
from splitpoint.errors import UsageError

from .. import tiny


class TestGenerate:
    def test_it_is_greedy_and_dispatches_each_step_at_its_size(self):
        config = Config(max_size=64, split_points=[8], backend="eager")
        compiled = compile(tiny.model(), config, dynamic_dims={"input_ids": 1})
        start = torch.tensor([[3, 1, 4]])
        ids = generate(compiled, start, end_token=-1, max_size=64)
        assert ids.shape == (1, 3 + NEW_TOKENS)
        # What a step chose is the likeliest token after everything before it.
        best = tiny.model()(input_ids=ids).logits.argmax(-1)
        assert torch.equal(ids[:, 3:], best[:, 2:-1])
        calls = {str(range_): n for range_, n in compiled.stats().dispatches.items()}
        assert sum(calls.values()) == NEW_TOKENS
        assert calls["[9,64]"] == NEW_TOKENS - 6  # sizes 3 to 8 go elsewhere

    def test_it_stops_at_the_end_token(self):
        model = tiny.model()
        start = torch.tensor([[3, 1, 4]])
        ids = generate(model, start, end_token=-1, max_size=64)
        end = int(ids[0, 3])
        assert torch.equal(generate(model, start, end_token=end, max_size=64), start)

    def test_it_stops_at_the_largest_size(self):
        # The last call is at max_size, and gives one token more.
        ids = generate(tiny.model(), torch.tensor([[3, 1, 4]]), end_token=-1, max_size=5)
        assert ids.shape == (1, 6)


class TestChat:
    @pytest.fixture
    def tokenizer(self, tmp_path: Path):
        tiny.save_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        return tokenizer

    def test_ids(self, tokenizer):
        assert chat_ids(tokenizer, "b", max_size=1).tolist() == [[2]]

    def test_a_prompt_that_is_too_long(self, tokenizer):
        with pytest.raises(UsageError, match="1 tokens, more than max_size=0"):
            chat_ids(tokenizer, "b", max_size=0)
