"""Rotary embeddings whose frequencies depend on the longest position of a call.

A prompt goes in parts, and its keys stay as they were written: beyond the length from which such
frequencies change, parts and steps of one sequence would be turned by different ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import UnsupportedModel


@dataclass(frozen=True)
class RopeLimit:
    """Below how many positions the frequencies are the same whatever the call."""

    kind: str
    """As configurations name it."""
    positions: int

    def check(self, places: Tensor) -> None:
        """Refuse a call whose positions reach the limit.

        Raises:
            UnsupportedModel: when they do.
        """
        longest = int(places.max()) + 1
        if longest > self.positions:
            raise UnsupportedModel(
                f"the call has {longest} positions, and from {self.positions} on the rotary "
                f"embedding ({self.kind!r}) of the model changes with the length:\n"
                f"stay within {self.positions}, new tokens included, or leave it to transformers"
            )


def rope_limit(config: Any) -> RopeLimit | None:
    """The lowest limit of a text configuration's layers; None where there is none."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Models with layers of several kinds have a dictionary for each kind.
    each = [value for value in given.values() if isinstance(value, dict)] or [given]
    limits = [limit for parameters in each if (limit := _limit(config, parameters)) is not None]
    return min(limits, key=lambda limit: limit.positions, default=None)


def _limit(config: Any, parameters: dict[str, Any]) -> RopeLimit | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    trained = getattr(config, "max_position_embeddings", None)
    if kind == "longrope":
        name = "original_max_position_embeddings"
        trained = parameters.get(name) or getattr(config, name, None) or trained
    elif "dynamic" not in kind:
        return None
    return None if trained is None else RopeLimit(kind, int(trained))
