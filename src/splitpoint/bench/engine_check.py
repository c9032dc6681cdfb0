"""`splitpoint bench vllm --check`: whether vLLM answers the same with this package as without."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import OutputMismatch
from .differences import NEAR, Compared

TOKENS = 32
"""Of each answer."""


@dataclass(frozen=True)
class CheckReport:
    """The outcome; `print` it."""

    environment: dict[str, Any]
    compared: Compared

    def to_json(self) -> str:
        """The fields, as an object."""
        return json.dumps({"environment": self.environment, **asdict(self.compared)}, indent=2)

    def __str__(self) -> str:
        env, found = self.environment, self.compared
        lines = [
            f"{env['model']}, {env['dtype']}, {env['threads']} threads, {env['mode']}; vLLM "
            f"{env['vllm']}, torch {env['torch']} on {env['cpu']}, {env['vectors']}",
            f"{found.same} of {found.answers} greedy answers of {found.tokens} tokens are the "
            f"same; log-probabilities differ by up to {found.largest or 0.0:.2g}",
            found.where("vLLM's own"),
        ]
        return "\n".join(filter(None, lines))

    def require(self) -> None:
        """Raise where more than rounding differs.

        Raises:
            OutputMismatch: for an answer that differs where one token was clearly the best.
        """
        near = NEAR[self.environment["dtype"]]
        for each in self.compared.differences:
            if each.gap is not None and each.gap > near:
                raise OutputMismatch(
                    f"prompt {each.prompt} is answered otherwise from token {each.token} on, where "
                    f"vLLM's two best logits are {each.gap:.3g} apart; rounding explains {near}"
                )
