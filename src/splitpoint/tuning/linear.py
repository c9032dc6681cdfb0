"""Choose the kernel of a linear layer for a range by measuring, right results first."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import linear
from ..passes.linear import LAYOUTS, VARIANTS, LinearShape
from ..ranges import Range
from .measure import clock_for, interleave

log = logging.getLogger("splitpoint")

COLD_BYTES = 48 << 20
"""Weights that the calls of a measurement cycle through, so that each finds its weight in
memory and not in a cache, as it does in a model."""

MOST_FLOPS = 5e8
"""A probe is no larger than this: what wins at it wins above it, where all kernels are bound
by arithmetic."""

INDUCTOR = "inductor"

SMALLEST = 1 << 15
"""Elements of a weight below which a layer costs about as much as its call, whatever runs it."""

WORTH_A_COPY = 1.05
"""A second layout of a weight must win by this factor over one that exists already."""


@dataclass
class LinearTuner:
    """Measures variants for the shapes it is asked about, and remembers.

    Ask for all ranges of a shape before the next shape: each shape's copies of weights are
    made when it is first asked about, and stay until another is.
    """

    threads: int
    budget_s: float = 10.0
    """Seconds (CPU time of the thread with one thread, else wall time) for all measuring; when
    they are spent, layers not measured yet stay with Inductor."""
    spent_s: float = 0.0
    _seconds: dict[tuple[LinearShape, int], dict[str, float]] = field(default_factory=dict)
    _layers: dict[str, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    _layers_of: LinearShape | None = None
    _weight: Tensor | None = None

    def choose(self, shape: LinearShape, range_: Range, layouts: Collection[str] = ()) -> str:
        """The fastest variant for a layer in a range: the least mean, over the range's first,
        middle and last size, of the time relative to the best variant there. Of variants
        within 5 % of that, one whose layout is among `layouts`, which exist already."""
        if shape.n * shape.k < SMALLEST:
            return INDUCTOR
        names = [INDUCTOR, *(n for n, v in VARIANTS.items() if v.admits(shape, range_))]
        losses = dict.fromkeys(names, 0.0)
        for size in probes(shape, range_):
            seconds = self.seconds(shape, size, names)
            if seconds is None:
                log.info("no time left to measure %s for %s: it stays with Inductor", shape, range_)
                return INDUCTOR
            best = min(seconds[name] for name in names)
            for name in names:
                losses[name] += seconds[name] / best
        best_name = min(names, key=losses.__getitem__)
        there = [n for n in names if n == INDUCTOR or VARIANTS[n].layout in {"plain", *layouts}]
        best_there = min(there, key=losses.__getitem__)
        if losses[best_there] <= WORTH_A_COPY * losses[best_name]:
            return best_there
        return best_name

    def free(self) -> None:
        """Free the copies of weights that measuring took."""
        self._layers, self._layers_of, self._weight = {}, None, None

    def seconds(self, shape: LinearShape, size: int, names: list[str]) -> dict[str, float] | None:
        """Median seconds a call of each variant at a size; None when the budget is spent."""
        known = self._seconds.setdefault((shape, size), {})
        if not set(names) <= known.keys():
            clock = clock_for(self.threads)
            start = clock.read()
            if self.spent_s >= self.budget_s:
                return None
            self._make_layers(shape)
            x = torch.randn(size, shape.k).to(shape.dtype)
            timed = {
                name: _cycling(self._layers[name], x)
                for name in names
                if name == INDUCTOR or self._is_right(name, x)
            }
            timings = interleave(timed, clock=clock, budget_s=0.008, warm_up=1, repeats=5)
            known |= dict.fromkeys(names, math.inf)
            known |= {name: timing.median_s for name, timing in timings.items()}
            self.spent_s += clock.read() - start
        return known

    def _make_layers(self, shape: LinearShape) -> None:
        if self._layers_of == shape:
            return
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape.n, shape.k, generator=generator).div_(shape.k**0.5)
        weight = weight.to(shape.dtype)
        count = min(max(2, math.ceil(COLD_BYTES / weight.nbytes)), 256)
        packed = {name: layout.pack(weight) for name, layout in LAYOUTS.items()}
        self._weight = weight
        self._layers_of = shape
        plain = [weight.clone() for _ in range(count)]
        self._layers = {INDUCTOR: [_plain(copy) for copy in plain]}
        for name, variant in VARIANTS.items():
            copies = (
                plain
                if variant.layout == "plain"
                else [packed[variant.layout].clone() for _ in range(count)]
            )
            self._layers[name] = [_layer(name, copy, shape) for copy in copies]

    def _is_right(self, name: str, x: Tensor) -> bool:
        """Compare a variant with float64: sums in fp32 in any order, then the dtype's own
        rounding. One that is wrong is never chosen, however fast."""
        assert self._weight is not None
        # Columns at random and the last ones, where a block may be cut: all of them in
        # float64 would take longer than everything else here.
        rows = self._weight.shape[0]
        columns = torch.cat([torch.randint(rows, (512,)), torch.arange(rows)[-64:]])
        y, weight = self._layers[name][0](x)[:, columns], self._weight[columns]
        exact = linear(x, weight)
        magnitude = x.double().abs() @ weight.double().abs().t()
        roundoff = torch.finfo(y.dtype).eps / 2
        allowed = (x.shape[1] + 4) * 2.0**-24 * magnitude + 1.01 * roundoff * exact.abs() + 1e-30
        right = bool(((y.double() - exact).abs() <= allowed).all())
        if not right:
            log.warning("linear variant %r is wrong for %s and is not used", name, self._layers_of)
        return right


def probes(shape: LinearShape, range_: Range) -> list[int]:
    """The sizes at which a range is measured: its first, (geometric) middle and last, as far
    as they are not too large to be measured in a moment."""
    largest = max(1, int(MOST_FLOPS / (2 * shape.n * shape.k)))
    end = min(range_.end, max(largest, range_.start))
    middle = round(math.sqrt(range_.start * end))
    return sorted({range_.start, middle, end})


def _plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def _layer(name: str, weight: Tensor, shape: LinearShape) -> Callable[[Tensor], Tensor]:
    run = VARIANTS[name].run
    return lambda x: run(x, weight, shape, None)


def _cycling(layers: list[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], object]:
    following = itertools.cycle(layers)
    return lambda: next(following)(x)
