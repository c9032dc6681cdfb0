"""Time this package's kernel against vLLM's own, on slices of a model's weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.bounds import exceeded
from ...kernels.memory import Streamed
from ...tuning.measure import Budget, clock_for, interleave
from .choice import Measured
from .shapes import Shape

ROWS = (1, 4, 8, 16, 64, 256, 512)

COLD_BYTES = 48 << 20
"""Weights that calls cycle through, so that each finds its own in memory, as in a model."""

MOST_ELEMENTS = 2 << 20
"""Of the slice of a weight that is measured: what more columns cost is proportional."""

MOST_COPIES = 256
CHECKED_COLUMNS = 32
PROBE_S = 0.02

Prepare = Callable[[Any, bool], None]
"""vLLM's function that gives a layer its `cpu_linear`, and may be told to free its weight."""


def measure(
    weights: Mapping[Shape, Sequence[Tensor]], theirs: Prepare, budget: Budget
) -> dict[Shape, Measured]:
    """Times of each shape by rows, few rows first, until the budget is spent.

    Args:
        weights: of some layers of each shape.
        theirs: vLLM's function that gives a layer its `cpu_linear`.
        budget: for all shapes.
    """
    measured: dict[Shape, dict[int, tuple[float, float]]] = {shape: {} for shape in weights}
    for index, shape in enumerate(weights):
        share = Budget((budget.seconds - budget.spent_s) / (len(weights) - index))
        with budget.spending(), share.spending():
            slices = _Slices(shape, weights[shape], theirs)
        for rows in ROWS:
            last = sum(measured[shape][max(measured[shape])]) if measured[shape] else 0.0
            # A probe is some calls of each, which take longer in proportion to their rows.
            if share.spent_s + 5 * last * rows / max(measured[shape], default=1) > share.seconds:
                break
            with budget.spending(), share.spending():
                times = slices.times(rows)
            measured[shape][rows] = times
            if math.isinf(times[0]):
                break
    return dict(measured)


class _Slices:
    """Slices of the weights of a shape as both kernels have them."""

    def __init__(self, shape: Shape, weights: Sequence[Tensor], theirs: Prepare) -> None:
        self.k, self.dtype = shape.k, shape.dtype
        columns = min(shape.columns, max(CHECKED_COLUMNS, MOST_ELEMENTS // max(1, shape.k)))
        parts = [part for weight in weights for part in torch.split(weight, columns)]
        whole = [part for part in parts if part.shape[0] == columns]
        count = min(MOST_COPIES, math.ceil(COLD_BYTES / whole[0].nbytes))
        from .kernel import Packed

        memory = Streamed()
        self.first = whole[0]
        self.ours: list[Packed] = []
        self.theirs: list[Any] = []
        for part in itertools.islice(itertools.cycle(whole), count):
            self.ours.append(Packed(part, memory))
            layer: Any = nn.Module()
            layer.weight = nn.Parameter(part, requires_grad=False)
            theirs(layer, False)
            self.theirs.append(layer)

    def times(self, rows: int) -> tuple[float, float]:
        """Median seconds a call; infinite for the kernel of this package where it is wrong."""
        generator = torch.Generator().manual_seed(0)  # vLLM's own stays as it was
        x = torch.randn(rows, self.k, generator=generator, dtype=torch.float32).to(self.dtype)
        ours, theirs = itertools.cycle(self.ours), itertools.cycle(self.theirs)

        def call_theirs() -> Tensor:
            layer = next(theirs)
            made: Tensor = layer.cpu_linear(x, layer.weight, None)
            return made

        calls: dict[str, Callable[[], object]] = {"theirs": call_theirs}
        if self._is_right(x):
            calls["ours"] = lambda: next(ours)(x, None, None)
        timings = interleave(
            calls,
            clock=clock_for(torch.get_num_threads()),
            budget_s=PROBE_S,
            repeats=5,
            warm_up=1,
        )
        mine = timings["ours"].median_s if "ours" in timings else math.inf
        return mine, timings["theirs"].median_s

    def _is_right(self, x: Tensor) -> bool:
        """Whether sums in fp32, in any order, can make the first and last columns what they are."""
        y = self.ours[0](x, None, None)
        picked = [*range(CHECKED_COLUMNS), *range(-CHECKED_COLUMNS, 0)]
        picked = [each for each in picked if -y.shape[1] <= each < y.shape[1]]
        return exceeded([y[:, picked]], x, [self.first[picked]]) <= 1
