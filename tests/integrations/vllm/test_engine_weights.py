"""vLLM's own engine with layers in int8 and int4: as with a model that was rounded before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from splitpoint.passes.linear import rounded

from .starting import NEEDS_VLLM, Answer, start

pytestmark = NEEDS_VLLM


def rounded_before(model: Path, folder: Path, weights: str) -> Path:
    """The model with the values that its weights are rounded to; head and embedding apart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    for name, module in own.named_modules():
        if isinstance(module, nn.Linear):
            kind = "int8" if name == "lm_head" else weights
            state[f"{name}.weight"] = rounded(module.weight.detach(), kind)
    own.config.tie_word_embeddings = False
    other = type(own)(own.config)
    other.load_state_dict(state)
    other.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def asked(weights: str, activations: str | None = None) -> dict[str, object]:
    rounding = {"weights": weights, "activations": activations}
    return {"additional_config": {"splitpoint": rounding}}


def set_times(cache: Path, ours: float, others: float) -> None:
    """What starts find as measured: the same at all rows."""
    (path,) = (cache / "vllm").iterdir()
    kept = json.loads(path.read_text())
    kept["seconds"] = {key: {"1": (ours, others)} for key in kept["seconds"]}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_vllm_answers_as_with_the_rounded_model(
    model: Path, cache: Path, own: Answer, tmp_path: Path, weights: str
) -> None:
    folder = rounded_before(model, tmp_path / "rounded", weights)
    want = start(folder, tmp_path / "unused", env={"SPLITPOINT_VLLM": "0"})
    assert want.tokens != own.tokens

    answer = start(model, cache, llm=asked(weights))
    assert answer.tokens == want.tokens
    assert "left as they are: none" in answer.said
    in_8 = 10 if weights == "int8" else 2  # the head, and the embedding, which is not called
    assert f"{in_8} layers in int8" in answer.said
    assert answer.freed.count(True) == 8
    assert "measured in" in answer.said

    # Both ways in one graph, whose measured times are found again.
    (path,) = (cache / "vllm").iterdir()
    kept = json.loads(path.read_text())
    assert all(
        f" in {'int8' if 'embedding' in each else weights}" in each for each in kept["seconds"]
    )
    times = {"1": (1.0, 2.0), "8": (1.0, 2.0), "32": (2.0, 1.0)}
    kept["seconds"] = dict.fromkeys(kept["seconds"], times)
    path.write_text(json.dumps(kept))
    compiled = start(model, cache, llm={**asked(weights), "enforce_eager": False})
    assert compiled.tokens == want.tokens
    assert "up to 16 rows, unpacked for more" in compiled.said


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_layers_round_their_input_where_that_is_faster(
    model: Path, cache: Path, weights: str
) -> None:
    plain = start(model, cache, llm=asked(weights))
    start(model, cache, llm=asked(weights, "int8"))
    set_times(cache, ours=1.0, others=2.0)
    assert start(model, cache, llm=asked(weights, "int8")).tokens == plain.tokens

    set_times(cache, ours=2.0, others=1.0)
    rounding = start(model, cache, llm=asked(weights, "int8"))
    assert f"in {weights} with x in int8" in rounding.said
    assert "an embedding any rows" in rounding.said or "an embedding unpacked" in rounding.said
    compiled = start(model, cache, llm={**asked(weights, "int8"), "enforce_eager": False})
    assert compiled.tokens == rounding.tokens


def test_a_value_that_is_none_leaves_a_server_with_vllms_own(model: Path, cache: Path, own) -> None:
    answer = start(model, cache, llm=asked("int3"))
    assert answer.tokens == own.tokens
    assert answer.said.count("\n") == 0
    assert "vLLM's own linear layers are used, because of InvalidField: weights of" in answer.said


def test_without_a_compiler_it_says_that_weights_stay(model: Path, tmp_path: Path, own) -> None:
    answer = start(model, tmp_path, llm=asked("int8"), env={"CXX": "/no/compiler"})
    assert answer.tokens == own.tokens
    assert "weights are not rounded to int8: vLLM's own linear layers are used" in answer.said
