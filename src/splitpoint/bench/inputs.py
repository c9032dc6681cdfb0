"""What a causal language model is called with when it is measured, and what is taken from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..torch_internals.baselines import forget_graphs

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


class CompiledForward:
    """As `last_logits`, by `torch.compile` with some options, and with graphs of its own.

    Dynamo keeps graphs by code object: two of these share none, though the model is the same.
    """

    def __init__(self, model: Any, *, copy_output: bool = False, **options: Any) -> None:
        """`copy_output` is for a backend that returns memory that its next call writes to."""

        def forward(ids: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return logits[:, -1]

        code = forward.__code__.replace()
        self._function = FunctionType(
            code, forward.__globals__, "forward", None, forward.__closure__
        )
        self._compiled: Forward = torch.compile(self._function, **options)
        self._copy_output = copy_output

    def __call__(self, ids: Tensor) -> Tensor:
        """Compiles at the first call of a size; with gradients off."""
        with torch.no_grad():
            logits = self._compiled(ids)
            return logits.clone() if self._copy_output else logits

    def forget(self) -> None:
        """Have Dynamo drop the graphs, which outlive this object otherwise."""
        forget_graphs(self._function)


def random_ids(vocabulary: int, size: int, seed: int = 0) -> Tensor:
    """Input ids [1, size], int64; the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + size)
    return torch.randint(vocabulary, (1, size), generator=generator)


def call_each(forward: Forward, sizes: Sequence[int]) -> None:
    """Call once at each size, the largest first: a graph made at 1 would be for 1 only."""
    for size in sorted(sizes, reverse=True):
        # Every vocabulary has id 0, and what the ids are does not change what is compiled.
        forward(torch.zeros(1, size, dtype=torch.int64))
