"""Sentence embeddings of texts in batches of mixed sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from splitpoint import Config
from splitpoint.bench.encode import BATCHES, MAX_LENGTH, batches, run, texts
from splitpoint.errors import ModelNotFound, OutputMismatch
from splitpoint.models.catalogue import load_encoder

CONFIG = Config(max_size=BATCHES[-1] * MAX_LENGTH, split_points=[256], cache_dir="")


def load_one_layer(dtype: torch.dtype) -> tuple[Any, Any]:
    model, tokenizer = load_encoder("minilm", dtype)
    del model.encoder.layer[1:]
    return model, tokenizer


@pytest.mark.slow
def test_every_way_is_checked_and_timed() -> None:
    report = run(load_one_layer, "minilm", torch.float32, count=24, rounds=3, config=CONFIG)
    assert [row.name for row in report.rows] == [
        "eager",
        "torch.compile(dynamic=True)",
        "splitpoint",
    ]
    for row in report.rows:
        assert row.texts_per_s > 0
        assert row.error < 1e-4
    assert report.rows[-1].after == 0
    data = json.loads(report.to_json())
    assert data["environment"]["texts"] == 24
    assert "compiles after" in str(report)


@pytest.mark.slow
def test_vectors_that_are_off_are_refused() -> None:
    def load(dtype: torch.dtype) -> tuple[object, object]:
        model, tokenizer = load_one_layer(dtype)
        if load.calls:  # type: ignore[attr-defined]
            forward = model.forward
            model.forward = lambda **given: forward(**given)
            with torch.no_grad():
                model.embeddings.LayerNorm.bias.add_(3)
        load.calls += 1  # type: ignore[attr-defined]
        return model, tokenizer

    load.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(OutputMismatch, match="eager is off by"):
        run(load, "minilm", torch.float32, count=2, rounds=3, config=CONFIG)


def test_texts_and_batches_are_the_same_each_time_and_padded_to_the_longest() -> None:
    try:
        tokenizer = load_encoder("minilm", torch.float32)[1]
    except ModelNotFound as error:
        pytest.skip(str(error))
    given = texts(tokenizer, 40)
    assert given == texts(tokenizer, 40)
    made = batches(tokenizer, given)
    assert sum(len(batch["input_ids"]) for batch in made) == 40
    for batch in made:
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] <= MAX_LENGTH
