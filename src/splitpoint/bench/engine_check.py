"""`splitpoint bench vllm --check`: whether vLLM answers the same with this package as without."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import OutputMismatch

TOKENS = 32
"""Of each answer."""

NEAR = {"fp32": 1e-3, "bf16": 0.5}
"""Up to so much between the two best logits, rounding may decide which token is the best: in bf16
a logit of 16 to 32 is rounded to an eighth."""


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the other one for the first time."""

    prompt: int
    """The number of the prompt, from 0."""
    token: int
    """The number of the token, from 0."""
    gap: float
    """Between vLLM's own two best logits there."""


@dataclass(frozen=True)
class CheckReport:
    """The outcome; `print` it."""

    environment: dict[str, Any]
    answers: int
    tokens: int
    """Of each answer."""
    differences: tuple[Difference, ...]
    """One for each answer that differs."""
    largest: float
    """The largest difference of a chosen token's log-probability before answers differ."""

    def to_json(self) -> str:
        """The fields, as an object."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        env = self.environment
        lines = [
            f"{env['model']}, {env['dtype']}, {env['threads']} threads, {env['mode']}; vLLM "
            f"{env['vllm']}, torch {env['torch']} on {env['cpu']}, {env['vectors']}",
            f"{self.answers - len(self.differences)} of {self.answers} greedy answers of "
            f"{self.tokens} tokens are the same; log-probabilities differ by up to "
            f"{self.largest:.2g}",
        ]
        if self.differences:
            gaps = [each.gap for each in self.differences]
            first = min(self.differences, key=lambda each: each.token)
            lines.append(
                f"first to differ: prompt {first.prompt}, token {first.token}; between vLLM's own "
                f"two best logits there: {first.gap:.3g} (median {statistics.median(gaps):.2g}, "
                f"at most {max(gaps):.3g} over all that differ)"
            )
        return "\n".join(lines)

    def require(self) -> None:
        """Raise where more than rounding differs.

        Raises:
            OutputMismatch: for an answer that differs where one token was clearly the best.
        """
        near = NEAR[self.environment["dtype"]]
        for each in self.differences:
            if each.gap > near:
                raise OutputMismatch(
                    f"prompt {each.prompt} is answered otherwise from token {each.token} on, where "
                    f"vLLM's two best logits are {each.gap:.3g} apart; rounding explains {near}"
                )


Answers = Sequence[Mapping[str, Any]]
"""For each prompt `tokens`, and `logprobs`: of each token, then of the best that was not chosen."""


def compare(own: Answers, ours: Answers, environment: dict[str, Any]) -> CheckReport:
    """Compare answers to the same prompts, of vLLM by itself and with this package."""
    differences = []
    largest = 0.0
    for number, (a, b) in enumerate(zip(own, ours, strict=True)):
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
        for one, other in zip(a["logprobs"][:same], b["logprobs"][:same], strict=True):
            largest = max(largest, abs(one[0] - other[0]))
        if same < len(pairs):
            best, second = a["logprobs"][same]
            differences.append(Difference(number, same, best - second))
    return CheckReport(environment, len(own), len(own[0]["tokens"]), tuple(differences), largest)
