"""`splitpoint generate`: a prompt, and the model's answer as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import Config
from ..bench.answer import Answer, Sampling, answer, check_length, prompt_ids
from ..bench.decoder import Prepared, prepare
from ..errors import UsageError
from ..models.catalogue import DTYPES, load
from ..report.environment import environment


@dataclass(frozen=True)
class Generated:
    """An answer and what it took; `print` it for the figures."""

    environment: dict[str, Any]
    text: str
    answer: Answer
    prepared: Prepared

    def to_json(self) -> str:
        """One object: the figures, the text, the environment."""
        return json.dumps(
            {
                "environment": self.environment,
                "text": self.text,
                "prompt_tokens": self.answer.prompt_tokens,
                "new_tokens": len(self.answer.tokens),
                "first_token_s": self.answer.first_token_s,
                "tokens_per_s": self.answer.tokens_per_s,
                "compiled": self.prepared.compiled,
                "loaded": self.prepared.loaded,
                "prepare_s": self.prepared.seconds,
            },
            indent=2,
        )

    def __str__(self) -> str:
        found = self.answer
        rate = found.tokens_per_s
        return "\n".join(
            [
                f"first token after {found.first_token_s * 1e3:.0f} ms "
                f"({found.prompt_tokens} tokens of prompt)",
                f"{len(found.tokens)} tokens"
                + (f", {rate:.1f} a second after the first" if rate is not None else ""),
                f"before that, {self.prepared}",
            ]
        )


def run(
    name: str,
    prompt: str,
    config: Config,
    *,
    dtype: str,
    threads: int,
    new_tokens: int,
    raw: bool = False,
    sampling: Sampling | None = None,
    layers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Generated:
    """Load a model, compile it, and write what it says after `prompt` to standard output.

    Raises:
        ModelNotFound: as `load`.
        UsageError: when the model has no tokenizer, or too few positions.
        UnsupportedModel: when it is no model for the paged cache.
    """
    say(f"loading {name} ({dtype}) ...")
    model, tokenizer = load(name, DTYPES[dtype], layers=layers)
    if tokenizer is None:
        raise UsageError(f"{name} has no tokenizer: a prompt cannot be read")
    ids = prompt_ids(tokenizer, prompt, raw=raw)
    check_length(model, name, ids.shape[1], new_tokens)
    torch.set_num_threads(threads)
    say(f"compiling {len(config.plan().entries)} ranges, or loading them from the store ...")
    prepared = prepare(model, config)
    found = answer(model, ids, new_tokens, tokenizer=tokenizer, write=write_now, sampling=sampling)
    print(flush=True)
    facts = {"model": name, "dtype": dtype, "threads": threads, "prompt": prompt}
    text = tokenizer.decode(found.tokens, skip_special_tokens=True)
    return Generated(environment() | facts, text, found, prepared)


def write_now(text: str) -> None:
    """Write to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
