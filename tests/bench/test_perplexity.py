"""The perplexity of a text: by hand, and for each kind of weights."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from splitpoint.bench.perplexity import AS_THEY_ARE, perplexity, run
from splitpoint.errors import UsageError
from tests import tiny


def test_it_is_e_to_the_mean_of_what_each_token_costs() -> None:
    table = torch.randn(5, 5)
    ids = [0, 3, 1, 1, 4, 2, 2]

    def logits_of(part: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=table[part])

    chances = table.softmax(1)
    # Windows of 3: the first token of each is not predicted, and the last window has one alone.
    pairs = [(0, 3), (3, 1), (1, 4), (4, 2)]
    cost = -sum(math.log(chances[before, after]) for before, after in pairs) / 4
    assert perplexity(logits_of, ids, 3) == pytest.approx(math.exp(cost), rel=1e-5)
    uniform = perplexity(lambda part: SimpleNamespace(logits=torch.zeros(1, 3, 5)), ids[:3], 3)
    assert uniform == pytest.approx(5)


def test_a_row_for_each_kind_of_weights(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("a b b a a b a b b " * 4)
    kinds = (None, "int8", "int4")
    report = run(str(folder), text, weights=kinds, dtype="fp32", tokens=20, window=8)
    labels = [AS_THEY_ARE, "int8", "int8, activations int8", "int4", "int4, activations int8"]
    assert [row.weights for row in report.rows] == labels
    plain, int8, both, int4, both4 = (row.perplexity for row in report.rows)
    assert plain != int8 == pytest.approx(plain, rel=0.05)
    assert both == pytest.approx(plain, rel=0.05)
    assert both4 == pytest.approx(int4, rel=0.05)
    assert "activations in int8" in report.rows[2].note
    assert f"{labels[2]}: " in str(report)
    assert "20 tokens of text.txt in windows of 8" in str(report)
    with pytest.raises(UsageError, match="cannot read the text"):
        run(str(folder), tmp_path / "none.txt")
    with pytest.raises(UsageError, match="256 positions, got 1"):
        run(str(folder), text, window=1)
