"""Where two ways to answer the same prompts first differ, and how near the two best tokens are."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_PROMPT = 100
"""In tokens."""

NEAR = {"fp32": 1e-3, "bf16": 0.5}
"""Up to so much between the two best logits, rounding may decide which token is the best: in bf16
a logit of 16 to 32 is rounded to an eighth."""

Answers = Sequence[Mapping[str, Any]]
"""For each prompt `tokens`, and `logprobs`: of each token, then of the best that was not chosen;
none of them where the tokens are not the likeliest ones."""


def random_prompts(count: int, numbers: random.Random, vocabulary: int = 1000) -> list[list[int]]:
    """Prompts of 1 to `LONGEST_PROMPT` tokens, without the first few, which mean things."""
    return [
        [numbers.randrange(5, vocabulary) for _ in range(numbers.randint(1, LONGEST_PROMPT))]
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the other one for the first time."""

    prompt: int
    """The number of the prompt, from 0."""
    token: int
    """The number of the token, from 0."""
    gap: float | None
    """Between the two best logits there, of the first way; None where they do not decide."""


@dataclass(frozen=True)
class Compared:
    """Answers of two ways to the same prompts."""

    answers: int
    tokens: int
    """Of each answer."""
    differences: tuple[Difference, ...]
    """One for each answer that differs."""
    largest: float | None
    """The largest difference of a chosen token's log-probability before answers differ; None where
    none is known."""

    @property
    def same(self) -> int:
        """Answers that are the same."""
        return self.answers - len(self.differences)

    @property
    def first(self) -> Difference | None:
        """The earliest difference."""
        return min(self.differences, key=lambda each: each.token, default=None)

    @property
    def gaps(self) -> list[float]:
        """What lies between the two best logits, where answers differ."""
        return [each.gap for each in self.differences if each.gap is not None]

    def where(self, whose: str) -> str:
        """The earliest difference in words, with the gaps by `whose` logits; "" where there is
        none."""
        if self.first is None:
            return ""
        text = f"first to differ: prompt {self.first.prompt}, token {self.first.token}"
        if self.first.gap is None:
            return text
        return (
            f"{text}; between {whose} two best logits there: {self.first.gap:.3g} (median "
            f"{statistics.median(self.gaps):.2g}, at most {max(self.gaps):.3g} over all that "
            f"differ)"
        )


def compare(own: Answers, ours: Answers) -> Compared:
    """Compare answers to the same prompts, token by token; gaps are by the first ones' scores."""
    differences: list[Difference] = []
    apart: list[float] = []
    for number, (a, b) in enumerate(zip(own, ours, strict=True)):
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
        scores = zip(a["logprobs"][:same], b["logprobs"][:same], strict=True)
        apart += [abs(one[0] - other[0]) for one, other in scores]
        if same < len(pairs):
            gap = None
            if a["logprobs"]:
                best, second = a["logprobs"][same]
                gap = best - second
            differences.append(Difference(number, same, gap))
    return Compared(
        len(own), len(own[0]["tokens"]), tuple(differences), max(apart) if apart else None
    )
