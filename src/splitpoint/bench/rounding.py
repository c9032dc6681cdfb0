"""What this package is asked to round in a server or an engine that it is part of."""

from __future__ import annotations

from collections.abc import Mapping

Rounding = Mapping[str, str]
"""Of `Config.weights` and `Config.activations`, those that are asked for: {"weights": "int8"}."""


def in_words(rounding: Rounding) -> str:
    """As "weights in int8, activations in int8"."""
    return ", ".join(f"{what} in {kind}" for what, kind in rounding.items())
