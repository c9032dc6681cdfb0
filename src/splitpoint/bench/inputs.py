"""What a causal language model is called with when it is measured, and what is taken from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""(input ids [1, size], int64) -> logits of the last token [1, vocabulary]"""


def last_logits(model: Any) -> Forward:
    """The model as a function of its input ids alone, for a causal language model.

    The last token attends to all others, so its logits depend on everything the model
    computes but cost one row of the output layer, as in a serving engine.
    """

    def forward(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]

    return forward


def random_ids(vocabulary: int, size: int, seed: int = 0) -> Tensor:
    """Input ids [1, size], int64; the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + size)
    return torch.randint(vocabulary, (1, size), generator=generator)
