"""Choose the kernel of a linear layer for a range by measuring, right results first."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.bounds import ROUNDOFF, Expected
from ..kernels.int4 import dequantize_int4, int4_group, quantize_int4, unpack_int4
from ..kernels.layout import quantize
from ..kernels.memory import Streamed
from ..passes.linear import LAYOUTS, VARIANTS, Layers, Variant, admitted, layout_of, rounds
from ..passes.linear_sites import LinearShape
from ..ranges import Range
from .measure import Budget, clock_for, interleave

log = logging.getLogger("splitpoint")

COLD_BYTES = 48 << 20
"""Weights that the calls of a measurement cycle through, so that each finds its weight in
memory and not in a cache, as it does in a model; variants take turns, and each has its own."""

EVICTED_BYTES = 128 << 20
"""What is read to put a weight out of the cache that variants share: a third-level cache was seen
to keep 96 MiB."""

MOST_FLOPS = 5e8
"""A probe of all variants is no larger than this: what wins by much at it wins above it too, where
all kernels are bound by arithmetic."""

MOST_FLOPS_OF_FEW = 16 * MOST_FLOPS
"""The same for the last probe of a range, of those that are near each other."""

NEAR = 1.3
"""Variants that take no more than so many times as long as the best at the last probe of all are
measured at the end of the range too."""

INDUCTOR = "inductor"

SMALLEST = 1 << 15
"""Elements of a weight below which a layer costs about as much as its call, whatever runs it."""

TIE = 1.02
"""Variants that differ by less count as equally fast: a weight then stays as the module has it."""

WORTH_PLAIN = 1.1
"""What a kernel of this package over a module's own weights must win by over a copy that other
ranges read. A model gains more from its copies than its layers do one by one: they lie on huge
pages, so what runs in between finds its own addresses translated. SmolLM2 at one token was 4 %
slower with plain weights, which its layers, measured alone, were up to 10 % faster with."""


WORTH_ROUNDING = 1.1
"""What a kernel that rounds activations must win by: their error, and for int8 weights one more
copy of them."""


@dataclass
class LinearTuner:
    """Measures variants for the shapes it is asked about, and remembers.

    Ask for all ranges of a shape, of any rows, before the next shape: its copies of weights are
    made when it is first asked about, and stay until another is.
    """

    threads: int
    budget: Budget = field(default_factory=Budget)
    """When it is spent, layers not measured yet stay with Inductor."""
    _seconds: dict[tuple[LinearShape, int], dict[str, float]] = field(default_factory=dict)
    _weights: Weights | None = None

    def choose(
        self,
        shape: LinearShape,
        range_: Range,
        layouts: Collection[str] = (),
        only_copies: bool = False,
        own: Sequence[Sequence[Tensor]] = (),
        weights: str = "",
        activations: str = "",
        batch_invariant: bool = False,
    ) -> str:
        """The fastest variant for a layer in a range: the least mean, over the range's first,
        middle and last size, of the time relative to the best variant there. Of variants
        within 2 % of that (10 %, where the best reads the module's own weight) one whose layout is
        among `layouts`, which other ranges read; then one that reads the module's own. With
        `only_copies` one that reads it is chosen only where no other is right. `own` are the
        weights of the layers in question: variants that read them are timed on them. With
        `weights` ("int8", "int4") it is one of the variants that make that of them, of which there
        must be one that fits. With `activations` ("int8") one that rounds x to that where it is
        faster by 10 %. With `batch_invariant` it is one whose rows do not depend on each other, of
        which there must be one."""
        rows = shape.rows_in(range_)
        fitting = admitted(shape, weights, activations, batch_invariant)
        names = [v.name for v in fitting if batch_invariant or v.promises(rows)]
        # What Inductor leaves of a layer over packed weights is a call of the same kernel.
        if not weights and not shape.packed and not batch_invariant:
            names = [INDUCTOR, *names]
        if len(names) == 1 or sum(shape.columns) * shape.k < SMALLEST:
            return names[0]
        losses = dict.fromkeys(names, 0.0)
        for probe in probes(shape, rows):
            seconds = self.seconds(shape, probe, names, own)
            if seconds is None:
                log.info("no time left to measure %s for %s: %s serves it", shape, range_, names[0])
                return names[0]
            best = min(seconds[name] for name in names)
            for name in names:
                losses[name] += seconds[name] / best
        names = self._near_at_the_end(shape, rows, names, losses, own)
        rounding = [n for n in names if n != INDUCTOR and VARIANTS[n].activations]
        if rounding:
            names = [n for n in names if n not in rounding]
            (rounds_x,), exact = rounding, min((losses[n] for n in names), default=math.inf)
            if losses[rounds_x] < math.inf and WORTH_ROUNDING * losses[rounds_x] <= exact:
                return rounds_x
        if batch_invariant:
            return names[0]
        if weights or shape.packed:
            names = [n for n in names if losses[n] < math.inf] or [INDUCTOR]
            return min(names, key=losses.__getitem__) if len(names) > 1 else names[0]
        if only_copies:
            copied = [n for n in names if _layout(n, shape) != "plain" and losses[n] < math.inf]
            names = copied or names
        first = min(names, key=losses.__getitem__)
        near = [n for n in names if losses[n] <= TIE * losses[first]]
        plain = [n for n in near if _layout(n, shape) == "plain"]
        worth = WORTH_PLAIN if first != INDUCTOR and _layout(first, shape) == "plain" else TIE
        read = [n for n in names if _layout(n, shape) in layouts]
        read = [n for n in read if losses[n] <= worth * losses[first]]
        return min(read or plain or near, key=losses.__getitem__)

    def _near_at_the_end(
        self,
        shape: LinearShape,
        rows: Range,
        names: list[str],
        losses: dict[str, float],
        own: Sequence[Sequence[Tensor]],
    ) -> list[str]:
        """The variants that may be chosen, those that were near each other at the last probe
        measured at the end of the range too, which adds to their losses."""
        end = last_probe(shape, rows)
        last = self._seconds[shape.of_any_rows, probes(shape, rows)[-1]]
        best = min(last[name] for name in names)
        near = [name for name in names if last[name] <= NEAR * best < math.inf]
        if end is None or len(near) < 2:
            return names
        seconds = self.seconds(shape, end, near, own)
        if seconds is None:
            return names
        best = min(seconds[name] for name in near)
        for name in near:
            losses[name] += seconds[name] / best
        return near

    def lead(self, shape: LinearShape, range_: Range, name: str) -> float:
        """How many times as long Inductor's own layer took as a variant, at that of the measured
        sizes of a range where it is least; infinite where it was not measured."""
        rows = shape.rows_in(range_)
        sizes = [*probes(shape, rows), last_probe(shape, rows)]
        known = [self._seconds.get((shape.of_any_rows, each), {}) for each in sizes if each]
        both = [each for each in known if {INDUCTOR, name} <= each.keys()]
        return min((each[INDUCTOR] / each[name] for each in both), default=math.inf)

    def free(self) -> None:
        """Free the copies of weights that measuring took."""
        self._weights = None

    def seconds(
        self,
        shape: LinearShape,
        rows: int,
        names: list[str],
        own: Sequence[Sequence[Tensor]] = (),
    ) -> dict[str, float] | None:
        """Median seconds a call of each variant for x of so many rows; None when the budget is
        spent."""
        shape = shape.of_any_rows
        known = self._seconds.setdefault((shape, rows), {})
        if not set(names) <= known.keys():
            if self.budget.is_spent:
                return None
            with self.budget.spending():
                if self._weights is None or self._weights.shape != shape:
                    self._weights = Weights(shape, own)
                calls = self._weights.calls(rows, names)
                known |= dict.fromkeys(names, math.inf)
                if not calls:
                    return known  # none is right
                timings = interleave(
                    calls,
                    clock=clock_for(self.threads),
                    budget_s=0.008,
                    warm_up=1,
                    repeats=5,
                    before=self._weights.evict,
                )
                known |= {name: timing.median_s for name, timing in timings.items()}
        return known


class Weights:
    """Random weights for a shape, in all layouts, as many copies as a cache does not hold.

    In the plain layout a model's `own` weights come before further copies: where the operating
    system put them, often in scattered pages, a kernel was seen to take 16 % longer than over a
    copy made for the measurement.
    """

    def __init__(self, shape: LinearShape, own: Sequence[Sequence[Tensor]] = ()) -> None:
        self.shape = shape
        self.own = [[weight.detach() for weight in weights] for weights in own]
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(n, shape.k, generator=generator) for n in shape.columns]
        self.matrices = [each.div_(shape.k**0.5).to(shape.dtype) for each in drawn]
        self.scales: list[Tensor] = []
        if shape.int8:
            self.matrices, scales = map(list, zip(*map(quantize, self.matrices), strict=True))
            self.scales = [scale.to(shape.dtype).float() for scale in scales]
        self._quantised: dict[str, _Quantised] = {}
        self.biases = [torch.randn(n).to(shape.dtype) for n in shape.columns if shape.bias]
        self.held = [m.t().contiguous() if shape.transposed else m for m in self.matrices]
        if shape.packed:
            layout = LAYOUTS["packed" if shape.int8 else shape.packed]
            self.held = list(map(layout.pack, self.matrices))
            if not shape.int8:
                pairs = zip(self.held, shape.columns, strict=True)
                self.matrices = [unpack_int4(held, n, shape.k) for held, n in pairs]
        self.count = math.ceil(COLD_BYTES / sum(each.nbytes for each in self.held))
        self._copies: dict[str, list[list[Tensor]]] = {}
        self._other: Tensor | None = None

    def first(self, name: str) -> list[Tensor]:
        """`matrices` in the layout of a variant."""
        return self.held if _layout(name, self.shape) == "plain" else self.copies(name)[0]

    def copies(self, name: str) -> list[list[Tensor]]:
        """The weights in the layout of a variant, again and again."""
        layout = _layout(name, self.shape)
        if layout not in self._copies:
            packed = [LAYOUTS[layout].pack(weight) for weight in self.held]
            own = self.own if layout == "plain" else []
            count = min(self.count, 256) - len(own)
            place = Streamed().placed if layout != "plain" else Tensor.clone

            def copy(weight: Tensor, held: Tensor) -> Tensor:
                # Placing an opaque tensor copies nothing: what is packed anew is.
                opaque = weight.layout != torch.strided
                return LAYOUTS[layout].pack(held) if opaque else place(weight)

            copies = [list(map(copy, packed, self.held)) for _ in range(count)]
            self._copies[layout] = [*own, *copies]
        return self._copies[layout]

    def quantised(self, name: str) -> _Quantised:
        """What a variant makes of `matrices`."""
        kind = name if name == INDUCTOR else VARIANTS[name].weights
        if kind not in self._quantised:
            if kind == "int8":
                pairs = [quantize(matrix) for matrix in self.matrices]
                self._quantised[kind] = _Quantised(*map(list, zip(*pairs, strict=True)))
            elif kind == "int4":
                group = int4_group(self.shape.k)
                assert group is not None
                each = [dequantize_int4(*quantize_int4(m, group)) for m in self.matrices]
                self._quantised[kind] = _Quantised(each, [])
            else:
                self._quantised[kind] = _Quantised(self.matrices, self.scales)
        return self._quantised[kind]

    def calls(self, rows: int, names: Sequence[str]) -> dict[str, Callable[[], object]]:
        """A call of each variant that is right."""
        x = torch.randn(rows, self.shape.k).to(self.shape.dtype)
        residual = None
        if self.shape.residual:
            residual = torch.randn(rows, self.shape.columns[0]).to(self.shape.dtype)
        checks: dict[tuple[bool, str, bool, str], _Check] = {}
        return {
            name: self._cycling(name, x, residual)
            for name in names
            if name == INDUCTOR or self._is_right(name, x, residual, checks)
        }

    def evict(self) -> None:
        """Put weights that calls do not cycle through, as one copy is enough, out of the cache:
        variants that read the same one would find what the last has left."""
        if self.count == 1:
            if self._other is None:
                self._other = torch.ones(EVICTED_BYTES, dtype=torch.uint8)
            torch.ops.splitpoint.read_memory(self._other)

    def _layers(self, name: str, weights: list[Tensor], residual: Tensor | None) -> Layers:
        scales = self.quantised(name).scales
        invariant = name != INDUCTOR and VARIANTS[name].batch_invariant
        return Layers(self.shape, weights, scales, self.biases, residual, invariant)

    def _cycling(self, name: str, x: Tensor, residual: Tensor | None) -> Callable[[], object]:
        run = _inductor if name == INDUCTOR else VARIANTS[name].run
        if name != INDUCTOR and not VARIANTS[name].fuses:
            products, shape = run, _only_products(self.shape)

            def run(x: Tensor, layers: Layers) -> list[Tensor]:
                return _one_pass(products(x, replace(layers, shape=shape, residual=None)), layers)

        following = itertools.cycle(
            [self._layers(name, each, residual) for each in self.copies(name)]
        )
        return lambda: run(x, next(following))

    def _is_right(
        self,
        name: str,
        x: Tensor,
        residual: Tensor | None,
        checks: dict[tuple[bool, str, bool, str], _Check],
    ) -> bool:
        """Compare a variant with float64: sums in fp32 in any order, or exact ones of an x that it
        rounds to int8, then the dtype's own rounding. One that is wrong is never chosen, however
        fast. What is to come out is kept in `checks` for the next variant of these inputs."""
        shape = self.shape
        fuses = VARIANTS[name].fuses
        if not fuses:  # the rest is plain torch
            shape, residual = _only_products(shape), None
        layers = replace(self._layers(name, self.first(name), residual), shape=shape)
        variant = VARIANTS[name]
        kind = (fuses, variant.weights, rounds(variant, shape), variant.activations)
        if kind not in checks:
            checks[kind] = self._check(shape, x, residual, self.quantised(name), kind[2], variant)
        check = checks[kind]
        made = VARIANTS[name].run(x, layers)
        columns = zip(made, check.columns, strict=False)
        worst = check.expected.exceeded([y[check.rows][:, picked] for y, picked in columns])
        if worst > 1:
            log.warning("linear variant %r is wrong for %s and is not used", name, self.shape)
        return worst <= 1

    def _check(
        self,
        shape: LinearShape,
        x: Tensor,
        residual: Tensor | None,
        made: _Quantised,
        rounds: bool,
        variant: Variant,
    ) -> _Check:
        # Some at random and the last ones, where a block may be cut: all of them in float64 would
        # take longer than everything else here.
        picked = [_some(n, 512) for n in shape.columns]
        rows = _some(len(x), 64)
        if shape.gated:
            picked[1] = picked[0]
        matrices = [m[columns] for m, columns in zip(made.matrices, picked, strict=True)]
        expected = Expected.of(
            x[rows],
            matrices,
            scales=[s[columns] for s, columns in zip(made.scales, picked, strict=False)],
            biases=[b[columns] for b, columns in zip(self.biases, picked, strict=False)],
            residual=None if residual is None else residual[rows][:, picked[0]],
            activation=shape.activation,
            gated=shape.gated,
            off=[ROUNDOFF[shape.dtype] * m.float().abs() for m in matrices] if rounds else [],
            rounds_x=bool(variant.activations),
            exact_sums=variant.exact_sums,
        )
        return _Check(rows, picked, expected)


@dataclass(frozen=True)
class _Quantised:
    """What the values are that a variant computes with."""

    matrices: list[Tensor]
    """[n, k] each; those of int8 still to be multiplied by their scales."""
    scales: list[Tensor]


@dataclass(frozen=True)
class _Check:
    """What some rows and columns of each output are to be."""

    rows: Tensor
    columns: list[Tensor]
    expected: Expected


def _some(count: int, most: int) -> Tensor:
    """Indices below a number: all of few, or some at random and the last."""
    if count <= most:
        return torch.arange(count)
    return torch.cat([torch.randint(count, (most,)), torch.arange(count)[-64:]])


def _layout(name: str, shape: LinearShape) -> str:
    """The layout of the weights that a variant reads."""
    return "plain" if name == INDUCTOR else layout_of(VARIANTS[name], shape)


def _only_products(shape: LinearShape) -> LinearShape:
    return replace(shape, activation="none", gated=False, residual=False)


def _inductor(x: Tensor, layers: Layers) -> list[Tensor]:
    """About what Inductor makes of layers: its products are torch's own."""
    weights = list(layers.weights)
    if layers.shape.int8:
        pairs = zip(weights, layers.scales, strict=True)
        weights = [weight.to(x.dtype) * scale[:, None].to(x.dtype) for weight, scale in pairs]
    if layers.shape.transposed:
        weights = [weight.t() for weight in weights]
    biases: Sequence[Tensor | None] = layers.biases or [None] * len(weights)
    pairs_ = zip(weights, biases, strict=True)
    return _one_pass([F.linear(x, weight, bias) for weight, bias in pairs_], layers)


def _one_pass(products: Sequence[Tensor], layers: Layers) -> list[Tensor]:
    """What Inductor adds for all that follows the products: one pass over them, whose time the
    memory takes and not the arithmetic."""
    if layers.shape.gated:
        return [products[0] * products[1]]
    if layers.residual is not None:
        return [products[0] + layers.residual]
    if layers.shape.activation != "none":
        return [product.abs() for product in products]
    return list(products)


def probes(shape: LinearShape, rows: Range) -> list[int]:
    """How many rows a layer is measured with: the fewest, the (geometric) middle and the most, as
    far as they are not too many to be measured in a moment."""
    largest = max(1, int(MOST_FLOPS / (2 * sum(shape.columns) * shape.k)))
    end = min(rows.end, max(largest, rows.start))
    middle = round(math.sqrt(rows.start * end))
    return sorted({rows.start, middle, end})


def last_probe(shape: LinearShape, rows: Range) -> int | None:
    """The end of a range, or how far a few variants are measured towards it; None where all of them
    are measured there."""
    most = int(MOST_FLOPS_OF_FEW / (2 * sum(shape.columns) * shape.k))
    end = min(rows.end, most)
    return end if end > probes(shape, rows)[-1] else None
