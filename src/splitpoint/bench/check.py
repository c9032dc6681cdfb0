"""Is a compiled model's output right? Asked before anything is timed: wrong is never fast."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputMismatch
from .inputs import Forward, last_logits, random_ids

INPUTS = 3
"""Different inputs tried at each size."""

FP32_LIMIT = 1e-4
"""fp32 keeps 24 bits: sums in another order, through some tens of layers, change the logits
by about 1e-6 of their norm. A hundred times that is still far from any wrong graph, whose
logits differ by about their own norm."""

BF16_FACTOR = 4.0
"""bf16 keeps 8 bits, so eager itself is off by several per cent of the logits' norm, and more
or less so from input to input. Kernels that fuse differently round at other places, for
better or worse: they may be off from the fp32 model by this many times what eager is."""


def check(model: Any, forwards: Mapping[str, Forward], sizes: Sequence[int]) -> dict[str, float]:
    """The worst error of each forward over the sizes: |logits - reference| / |reference|.

    The reference is the model itself in fp32, run eagerly. The error at a size is the root
    mean square over `INPUTS` inputs. `forwards` must hold "eager", which sets the limit in
    bf16: its own worst error over the sizes, times `BF16_FACTOR`.

    Raises:
        OutputMismatch: naming the forward, the size and the error that is over the limit.
    """
    exact = last_logits(model if model.dtype == torch.float32 else copy.deepcopy(model).float())
    errors: dict[str, dict[int, float]] = {name: {} for name in forwards}
    for size in sizes:
        inputs = [random_ids(model.config.vocab_size, size, seed) for seed in range(INPUTS)]
        expected = [exact(ids) for ids in inputs]
        for name, forward in forwards.items():
            outputs = [forward(ids) for ids in inputs]
            errors[name][size] = _error(outputs, expected)
    limit = FP32_LIMIT
    if model.dtype != torch.float32:
        limit = BF16_FACTOR * max(errors["eager"].values())
    for name, by_size in errors.items():
        for size, error in by_size.items():
            if not error <= limit:  # also catches nan
                raise OutputMismatch(
                    f"{name} is wrong at size {size}: its logits are off by {error:.2g} of their "
                    f"norm, more than rounding explains ({limit:.2g}); nothing was timed"
                )
    return {name: max(by_size.values()) for name, by_size in errors.items()}


def _error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square over pairs of |output - expected| / |expected| (2-norms)."""
    squares = [
        ((output.double() - right.double()).norm() / right.double().norm()).square()
        for output, right in zip(outputs, expected, strict=True)
    ]
    return float(torch.stack(squares).mean().sqrt())
