"""The server of transformers: what is asked of it, and that it answers with this package as without
and ends."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import torch

from splitpoint.bench.load import complete
from splitpoint.bench.server import HOST, Server, free_port
from splitpoint.bench.transformers_server import Asking, command, unavailable
from splitpoint.errors import UsageError

transformers = pytest.importorskip("transformers")
WORDS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose every token is a word."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,  # so that answers differ from token to token
        bos_token_id=1,
        eos_token_id=2,
    )
    made = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    tokenizer([f"w{number}" for number in range(WORDS)], made)
    return made


def tokenizer(words: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    numbers = {word: number for number, word in enumerate(words)}
    made = Tokenizer(WordLevel(numbers, unk_token=words[0]))
    made.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=words[2])
    fast.save_pretrained(folder)


def test_a_prompt_has_as_many_tokens_as_text(folder: Path) -> None:
    asking = Asking(folder)
    body = asking("another name", [5, 299, 7, 5], 9)
    assert len(body["prompt"].split()) == 4
    assert body["prompt"].split()[0] == body["prompt"].split()[3]
    assert body["model"] == str(folder)
    assert body["max_tokens"] == 9
    assert json.loads(body["generation_config"])["eos_token_id"] == -1


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig(vocab_size=WORDS).save_pretrained(tmp_path)
    tokenizer([f"+{number}-" for number in range(WORDS)], tmp_path)
    with pytest.raises(UsageError, match="too few words"):
        Asking(tmp_path)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(unavailable() is not None, reason=f"{unavailable()}")
def test_the_server_answers_the_same_with_splitpoint_and_ends(folder: Path, tmp_path: Path) -> None:
    asking = Asking(folder)

    async def answers(port: int) -> list[str]:
        asked = [[7 + n, 9, 30, 12][: 1 + n] for n in range(3)]
        made = [complete(HOST, port, "m", prompt, 12, asking) for prompt in asked]
        return [answer.text for answer in await asyncio.gather(*made)]

    found = []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SPLITPOINT_CACHE": str(tmp_path / "cache")}
    for with_splitpoint in (False, True):
        port = free_port()
        log = tmp_path / f"{with_splitpoint}.log"
        with Server(command(folder, port, "float32", with_splitpoint), port, env, log) as server:
            server.wait(600)
            found.append(asyncio.run(answers(port)))
            said = [line for line in server.lines() if "Splitpoint: " in line]
        assert len(said) == with_splitpoint
        assert not server._answers("/health")
    assert found[0] == found[1]
    assert all(len(text.split()) == 12 for text in found[0])
