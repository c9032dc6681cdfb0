"""Is a compiled model's output right? Asked before anything is timed: wrong is never fast."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Activations, Weights
from ..errors import OutputMismatch
from ..integrations.transformers.rounding import rounding
from ..tuning.measure import THREAD_CPU_TIME
from .inputs import Forward, last_logits, random_ids

INPUTS = 3
"""Different inputs tried at each size."""

SLOW_S = 2.0
"""Where a call takes longer, in CPU seconds of its thread, one input is tried: of many tokens, that
is, or in arithmetic that a CPU has no instructions for."""

FP32_LIMIT = 1e-4
"""fp32 keeps 24 bits: sums in another order, through some tens of layers, change the logits
by about 1e-6 of their norm. A hundred times that is still far from any wrong graph, whose
logits differ by about their own norm."""

BF16_FACTOR = 4.0
"""bf16 keeps 8 bits, so eager itself is off by several per cent of the logits' norm, and more
or less so from input to input. Kernels that fuse differently round at other places, for
better or worse: they may be off from the fp32 model by this many times what eager is."""

ROUNDED_FACTOR = 2.0
"""What others round in ways of their own, with other scales and zero points, may be off by this
many times what this package's rounding makes of the model."""


class Expected:
    """What a model's logits should be at some sizes, and how far off they may be.

    The reference is the model itself in fp32, run eagerly, with weights rounded as `weights` says.
    In bf16, and where a compiled model may round activations, the limit is what the model itself
    is off by (with `activations` in all layers), at its worst size, times `BF16_FACTOR`. With
    `own_rounding` the reference has the weights as they are, for those who round them in a way of
    their own, and the limit is what the model is off by when it rounds as `weights` and
    `activations` say, times `ROUNDED_FACTOR`.
    """

    def __init__(
        self,
        model: Any,
        sizes: Sequence[int],
        weights: Weights | None = None,
        activations: Activations | None = None,
        *,
        own_rounding: bool = False,
    ) -> None:
        """Runs the model, and for a while holds a copy of it in fp32."""
        self._inputs = {
            size: [random_ids(model.config.vocab_size, size, seed) for seed in range(INPUTS)]
            for size in sizes
        }
        self.sizes = tuple(sizes)
        whole = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        exact = last_logits(whole)
        with rounding(whole, None if own_rounding else weights, keep=True):
            self._outputs = {
                size: [exact(ids) for ids in inputs] for size, inputs in self._inputs.items()
            }
        self.eager_error = 0.0
        """The worst error of the model itself over the sizes."""
        self.limit = FP32_LIMIT
        """Largest error allowed."""
        if model.dtype != torch.float32 or activations or own_rounding:
            eager = last_logits(model)
            with rounding(model, weights, keep=True, activations=activations):
                self.eager_error = max(self._error(eager, size) for size in sizes)
            factor = ROUNDED_FACTOR if own_rounding else BF16_FACTOR
            self.limit = factor * self.eager_error

    def check(self, name: str, forward: Forward, sizes: Sequence[int] | None = None) -> float:
        """The worst error of a forward over the sizes (default: all): |logits - reference| /
        |reference|, at each size the root mean square over `INPUTS` inputs, or one of them where
        that takes long.

        Raises:
            OutputMismatch: naming the forward, the size and the error that is over the limit.
        """
        worst = 0.0
        for size in self._inputs if sizes is None else sizes:
            error = self._error(forward, size)
            if not error <= self.limit:  # also catches nan
                raise OutputMismatch(
                    f"{name} is wrong at size {size}: its logits are off by {error:.2g} of their "
                    f"norm, more than rounding explains ({self.limit:.2g}); it was not timed"
                )
            worst = max(worst, error)
        return worst

    def _error(self, forward: Forward, size: int) -> float:
        outputs: list[Tensor] = []
        for ids in self._inputs[size]:
            start = THREAD_CPU_TIME.read()
            outputs.append(forward(ids))
            if THREAD_CPU_TIME.read() - start > SLOW_S:
                break
        return _error(outputs, self._outputs[size][: len(outputs)])


def _error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square over pairs of |output - expected| / |expected| (2-norms)."""
    squares = [
        ((output.double() - right.double()).norm() / right.double().norm()).square()
        for output, right in zip(outputs, expected, strict=True)
    ]
    return float(torch.stack(squares).mean().sqrt())
