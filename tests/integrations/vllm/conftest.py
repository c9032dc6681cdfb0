"""A small random model in float32, and what vLLM by itself answers with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from splitpoint.kernels import build

from .starting import Answer, start


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.5,  # so that answers differ from token to token
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def built() -> Path:
    return build.library()


@pytest.fixture
def cache(tmp_path: Path, built: Path) -> Path:
    """A cache folder with the kernels and nothing else."""
    (tmp_path / "kernels").mkdir(mode=0o755)
    shutil.copy2(built, tmp_path / "kernels")
    return tmp_path


@pytest.fixture(scope="session")
def own(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """What vLLM says by itself."""
    cache = tmp_path_factory.mktemp("unused")
    answer = start(model, cache, env={"SPLITPOINT_VLLM": "0"})
    assert not [name for name in answer.imported if name.endswith((".kernels", ".stand_in"))]
    assert not (cache / "vllm").exists()
    assert answer.said == ""
    assert len({tuple(each) for each in answer.tokens}) == 3
    assert all(len(set(each)) > 3 for each in answer.tokens)
    return answer
