"""Time this package's kernel against vLLM's own, on slices of a model's weights."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OutputMismatch
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

CpuLinear = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""What vLLM calls as `layer.cpu_linear(x, weight, bias)`."""

Prepare = Callable[[Any, bool], None]
"""vLLM's function that gives a layer its `cpu_linear`, and may be told to free its weight."""


def measure(
    weights: Mapping[Shape, Sequence[Tensor]], theirs: Prepare, budget: Budget
) -> dict[Shape, Measured]:
    """Times of each shape by rows, few rows first, until the budget is spent: of this package's
    kernel and the other way that a layer has (`Shape.other`).

    Args:
        weights: of some layers of each shape.
        theirs: vLLM's function that gives a layer its `cpu_linear`.
        budget: for all shapes.

    Raises:
        OutputMismatch: when no kernel for rounded weights is right.
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
            if math.isinf(sum(times)):
                break
    return dict(measured)


class _Slices:
    """Slices of the weights of a shape as both kernels have them."""

    def __init__(self, shape: Shape, weights: Sequence[Tensor], theirs: Prepare) -> None:
        self.shape = shape
        columns = min(shape.columns, max(CHECKED_COLUMNS, MOST_ELEMENTS // max(1, shape.k)))
        parts = [part for weight in weights for part in torch.split(weight, columns)]
        whole = [part for part in parts if part.shape[0] == columns]
        self.first = whole[0]
        self.ours: list[CpuLinear] = []
        self.others: list[CpuLinear] = []
        """The other way."""
        if shape.weights is not None:
            self._round()
            return
        count = min(MOST_COPIES, math.ceil(COLD_BYTES / whole[0].nbytes))
        from .kernel import Packed

        memory = Streamed()
        for part in itertools.islice(itertools.cycle(whole), count):
            self.ours.append(Packed(part, memory))
            layer: Any = nn.Module()
            layer.weight = nn.Parameter(part, requires_grad=False)
            theirs(layer, False)
            self.others.append(functools.partial(_call, layer))

    def _round(self) -> None:
        """What is in a rounded weight changes no time."""
        from .rounded import Rounded

        memory = Streamed()
        first = Rounded(self.first, self.shape, memory)
        count = min(MOST_COPIES, math.ceil(COLD_BYTES / first.weights[0].nbytes))
        for each in [first, *(first.copy(memory) for _ in range(count - 1))]:
            self.ours.append(each)
            self.others.append(each.other)

    def times(self, rows: int) -> tuple[float, float]:
        """Median seconds a call; infinite for a kernel of this package where it is wrong.

        Raises:
            OutputMismatch: as `measure`.
        """
        generator = torch.Generator().manual_seed(0)  # vLLM's own stays as it was
        x = torch.randn(rows, self.shape.k, generator=generator).to(self.shape.dtype)
        calls: dict[str, Callable[[], object]] = {}
        if self._ours_are_right(x):
            ours_in_turn = itertools.cycle(self.ours)
            calls["ours"] = lambda: next(ours_in_turn)(x, None, None)
        if self._others_are_right(x):
            others_in_turn = itertools.cycle(self.others)
            calls["others"] = lambda: next(others_in_turn)(x, None, None)
        if not calls:
            raise OutputMismatch(f"no kernel for {self.shape} is right on this machine")
        timings = interleave(
            calls,
            clock=clock_for(torch.get_num_threads()),
            budget_s=PROBE_S,
            repeats=5,
            warm_up=1,
        )
        ours, others = (
            timings[name].median_s if name in timings else math.inf for name in ("ours", "others")
        )
        return ours, others

    def _ours_are_right(self, x: Tensor) -> bool:
        """Whether sums in fp32, in any order, can make the first and last columns what they are."""
        y = self.ours[0](x, None, None)
        if self.shape.weights is not None:
            return self._is_rounded_product(y, x, is_other=False)
        picked = self._picked()
        return exceeded([y[:, picked]], x, [self.first[picked]]) <= 1

    def _others_are_right(self, x: Tensor) -> bool:
        """As `_ours_are_right`; vLLM's own is not this package's to judge."""
        if self.shape.weights is None:
            return True
        return self._is_rounded_product(self.others[0](x, None, None), x, is_other=True)

    def _is_rounded_product(self, y: Tensor, x: Tensor, is_other: bool) -> bool:
        from .rounded import Reference

        return Reference(self.first, self.shape, self._picked()).agrees(y, x, is_other)

    def _picked(self) -> list[int]:
        """The first and last columns."""
        n = self.first.shape[0]
        return sorted({*range(min(n, CHECKED_COLUMNS)), *range(max(0, n - CHECKED_COLUMNS), n)})


def _call(layer: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """vLLM's own, which may read the layer's weight."""
    made: Tensor = layer.cpu_linear(x, layer.weight, bias)
    return made
