"""A model compiled for `generate`, warmed up, and what that took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Config
from ..integrations import transformers as integration


@dataclass(frozen=True)
class Prepared:
    """What was done before the first token could be asked for."""

    seconds: float
    """On the wall."""
    compiled: int
    """Pieces compiled, ranges counted each."""
    loaded: int
    """Pieces taken from the store, ranges counted each."""

    def __str__(self) -> str:
        return (
            f"{self.compiled} pieces compiled, {self.loaded} loaded from the store "
            f"in {self.seconds:.1f} s"
        )


def prepare(model: Any, config: Config) -> Prepared:
    """Compile a model in place, and call it once, with which all ranges are there."""
    start = time.perf_counter()
    integration.compile(model, config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    decoder = integration.decoder_of(model)
    stats = [part.stats() for part in (decoder.body, decoder.head)]
    return Prepared(
        time.perf_counter() - start,
        sum(each.compilations for each in stats),
        sum(each.loads for each in stats),
    )
