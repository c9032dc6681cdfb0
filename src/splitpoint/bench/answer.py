"""An answer of a causal language model, token by token, with the time of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; greedily where none is given."""

    temperature: float = 1.0
    seed: int = 0


@dataclass
class Answer:
    """What was generated, and when each token came."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    """Seconds from the call until each token was there."""

    @property
    def first_token_s(self) -> float:
        """Seconds until the first token."""
        return self.at_s[0]

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first; None where there is no second."""
        if len(self.at_s) < 2:
            return None
        return (len(self.at_s) - 1) / (self.at_s[-1] - self.at_s[0])


class _Watch:
    """A streamer: notes when tokens come, and passes them on."""

    def __init__(self, answer: Answer, streamer: Any | None) -> None:
        self._answer, self._streamer = answer, streamer
        self._is_prompt = True
        self._start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """The prompt at first, then each token."""
        if not self._is_prompt:
            self._answer.at_s.append(time.perf_counter() - self._start)
            self._answer.tokens.append(int(value))
        self._is_prompt = False
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Nothing comes any more."""
        if self._streamer is not None:
            self._streamer.end()


def prompt_ids(tokenizer: Any, prompt: str, *, raw: bool = False) -> Tensor:
    """The ids [1, tokens], int64, of a chat that starts with a prompt and awaits the answer; of
    the prompt alone where it is `raw` or the tokenizer knows no chats.

    Raises:
        UsageError: when there are none.
    """
    if raw or not getattr(tokenizer, "chat_template", None):
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        chat = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids: Tensor = encoded["input_ids"]
    if ids.numel() == 0:
        raise UsageError("the prompt has no tokens: ask something")
    return ids.long()


def check_length(model: Any, name: str, prompt_tokens: int, new_tokens: int) -> None:
    """Raises `UsageError` for more tokens than a model has positions."""
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and prompt_tokens + new_tokens > most:
        raise UsageError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones exceed the {most} "
            f"positions of {name}: shorten the prompt or ask for fewer new tokens"
        )


def answer(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    *,
    tokenizer: Any | None = None,
    write: Callable[[str], object] | None = None,
    sampling: Sampling | None = None,
    max_time_s: float | None = None,
) -> Answer:
    """Let a model go on from `ids` [1, tokens] until its end token, `new_tokens` new ones, or
    `max_time_s`; `write` is given the text as it comes."""
    found = Answer(ids.shape[1])
    streamer = None
    if tokenizer is not None and write is not None:
        streamer = _text_streamer(tokenizer, write)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if sampling is not None:
        how = {"do_sample": True, "temperature": sampling.temperature}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if sampling is None else sampling.seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            max_time=max_time_s,
            pad_token_id=_pad_token(model),
            streamer=_Watch(found, streamer),
            **how,
        )
    return found


def _pad_token(model: Any) -> int:
    """One row needs no padding, but transformers warns where there is no token for it."""
    given = model.generation_config
    token = given.pad_token_id if given.pad_token_id is not None else given.eos_token_id
    token = token[0] if isinstance(token, list) else token
    return 0 if token is None else int(token)


def _text_streamer(tokenizer: Any, write: Callable[[str], object]) -> Any:
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: write(text)
    return streamer
