"""`transformers serve` as a server of `splitpoint bench serve`, with this package and without.

It takes prompts as text only, ends answers where a model would unless told otherwise, and refuses
fields that it does not know.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .rounding import Rounding
from .server import HOST

NEEDED = ("transformers", "fastapi", "uvicorn", "openai", "typer")
"""What the server imports, as modules."""

MOST_TOKENS = 512
"""Of a step: the server makes one of several requests."""
MEMORY = 0.1
"""The share of the memory that its cache may take."""

CANDIDATES = 4000
"""Tokens of a vocabulary that are tried as words of prompts."""


def unavailable() -> str | None:
    """Why it cannot be started here, and what to do about it; None where it can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"transformers serve needs {missing[0]}: pip install 'transformers[serving]'"
    return None


def command(
    folder: Path,
    port: int,
    dtype: str,
    with_splitpoint: bool,
    rounding: Rounding | None = None,
) -> list[str]:
    """What starts a server.

    Args:
        folder: of the model, in Hugging Face's format.
        port: of this machine's own address.
        dtype: "bfloat16" or "float32".
        with_splitpoint: whether `integrations.transformers` compiles the model.
        rounding: what it rounds "weights" and "activations" to.
    """
    return [
        *(sys.executable, "-m", "splitpoint.bench.transformers_server", str(folder)),
        *("--port", str(port), "--dtype", dtype),
        *(["--with-splitpoint"] if with_splitpoint else []),
        *(["--rounding", json.dumps(dict(rounding))] if with_splitpoint and rounding else []),
    ]


class Asking:
    """The requests that the server takes, for prompts that are tokens: each token stands for a word
    that is a token by itself.

    Raises:
        UsageError: when the model's tokenizer has hardly any such words.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = str(folder)
        most = len(self._tokenizer)
        few = min(1000, most // 2)  # as `Load.prompts` leaves them out
        self._words = [
            word for token in range(few, min(most, few + CANDIDATES)) if (word := self._word(token))
        ]
        if len(self._words) < min(CANDIDATES, most - few) // 10:
            raise UsageError(f"the tokenizer in {folder} has too few words for prompts as text")

    def _word(self, token: int) -> str | None:
        word: str = self._tokenizer.decode([token]).strip()
        return word if word.isalnum() and self._tokens(f" {word}") == [token] else None

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def text(self, prompt: Sequence[int]) -> str:
        """As many words."""
        text = "".join(f" {self._words[token % len(self._words)]}" for token in prompt)
        assert len(self._tokens(text)) == len(prompt)
        return text

    def __call__(self, model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """The body of a request for a greedy answer of so many tokens; the server knows its model
        by the folder."""
        config = {
            "do_sample": False,
            "eos_token_id": -1,  # which there is not: an answer does not end before
            "pad_token_id": 0,
            "max_new_tokens": tokens,
        }
        return {
            "model": self._model,
            "prompt": self.text(prompt),
            "max_tokens": tokens,
            "generation_config": json.dumps(config),
            "stream": True,
        }


def main(arguments: list[str]) -> None:
    """What the process does, until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--with-splitpoint", action="store_true")
    parser.add_argument("--rounding", type=json.loads, default={})
    args = parser.parse_args(arguments)
    if args.with_splitpoint:
        compile_what_is_loaded(args.rounding)
    # Its class and not its command, which asks the network for a newer version.
    from transformers.cli.serve import Serve

    Serve(
        force_model=args.folder,
        continuous_batching=True,
        cb_max_batch_tokens=MOST_TOKENS,
        cb_max_memory_percent=MEMORY,
        device="cpu",
        dtype=args.dtype,
        host=HOST,
        port=args.port,
    )


def compile_what_is_loaded(rounding: Rounding) -> None:
    """Have `integrations.transformers` compile the server's model when it has been loaded, before
    the server answers."""
    from transformers.cli.serving.model_manager import ModelManager

    load: Callable[..., Any] = ModelManager.load_model_and_processor
    compiled: set[int] = set()

    def load_and_compile(self: Any, *args: Any, **given: Any) -> Any:
        model, processor = load(self, *args, **given)
        if id(model) not in compiled:
            compiled.add(id(model))
            _compile(model, rounding)
        return model, processor

    ModelManager.load_model_and_processor = load_and_compile


def _compile(model: Any, rounding: Rounding) -> None:
    import torch

    from ..integrations import transformers

    start = time.perf_counter()
    asked: dict[str, Any] = dict(rounding)
    transformers.compile(model, replace(transformers.CONFIG, **asked))
    prompt = torch.ones(1, 2, dtype=torch.long)
    model.generate(prompt, do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=2)
    print(f"Splitpoint: compiled, or loaded, in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
