"""Choose the kernel of attention for a range by measuring, right results first."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.pieces import TensorKind
from ..kernels.attention import exceeded
from ..passes.attention import VARIANTS, AttentionShape, products
from ..ranges import Range
from .measure import Budget, clock_for, interleave

log = logging.getLogger("splitpoint")

TORCH = "torch"

MOST_PRODUCTS = 1.5e9
"""A probe takes no more multiplications than this: larger ones take long. It is a text of some
hundred tokens, from where what is faster stays so."""


CHECKED_QUERIES = 48
"""How many queries of a probe are compared with float64, from the first to the last, evenly:
computing all of a long text's would take longer than measuring it."""


@dataclass
class AttentionTuner:
    """Measures variants for the shapes it is asked about, and remembers."""

    threads: int
    budget: Budget = field(default_factory=Budget)
    """When it is spent, attention that is not measured yet stays with torch."""
    _seconds: dict[tuple[AttentionShape, int], dict[str, float]] = field(default_factory=dict)

    def choose(self, shape: AttentionShape, range_: Range) -> str:
        """The fastest variant for attention in a range: the least mean, over the range's first,
        middle and last size, of the time relative to the best variant there."""
        admitted = [n for n, v in VARIANTS.items() if v.fits(shape) and v.promises(shape, range_)]
        names = [TORCH, *admitted]
        losses = dict.fromkeys(names, 0.0)
        for size in probes(shape, range_) if admitted else ():
            seconds = self.seconds(shape, size, names)
            if seconds is None:
                log.info("no time left to measure %s for %s: it stays with torch", shape, range_)
                return TORCH
            best = min(seconds.values())
            for name in names:
                losses[name] += seconds[name] / best
        return min(names, key=losses.__getitem__)

    def seconds(
        self, shape: AttentionShape, size: int, names: Sequence[str]
    ) -> dict[str, float] | None:
        """Median seconds a call of each variant at a size, infinite for one that is wrong; None
        when the budget is spent."""
        known = self._seconds.get((shape, size), {})
        if not set(names) <= known.keys():
            if self.budget.is_spent:
                return None
            with self.budget.spending():
                calls = _calls(shape, size, names)
                timings = interleave(
                    calls, clock=clock_for(self.threads), budget_s=0.008, warm_up=1, repeats=5
                )
            known = dict.fromkeys(names, math.inf)
            known |= {name: timing.median_s for name, timing in timings.items()}
            self._seconds[shape, size] = known
        return {name: known[name] for name in names}


def probes(shape: AttentionShape, range_: Range) -> list[int]:
    """The sizes that attention is measured at: the first, the (geometric) middle and the last, as
    far as they are not too large to be measured in a moment; a smaller one where the first is."""
    start, end = range_.start, range_.end
    while end > start and products(shape, end) > MOST_PRODUCTS:
        end = max(start, end // 2)
    while products(shape, start) > MOST_PRODUCTS and _is_there(shape, start // 2):
        start = end = start // 2
    return sorted({start, round(math.sqrt(start * end)), end})


def _is_there(shape: AttentionShape, size: int) -> bool:
    """Whether a size, which may lie below the range, leaves something of every tensor."""
    kinds = (shape.query, shape.key, shape.value)
    return all(length > 0 for kind in kinds for length in kind.shape_at(size))


def _calls(
    shape: AttentionShape, size: int, names: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """A call of each variant that is right, over random tensors that lie as they will, and a mask
    as models make it."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        _tensor(kind, size, generator) for kind in (shape.query, shape.key, shape.value)
    )
    mask = None if shape.mask is None else _tensor(shape.mask, size, generator)
    typical = None if mask is None else typical_mask(mask)
    tensors = (query, key, value, typical)
    queries = query.shape[2]
    only = torch.linspace(0, queries - 1, min(queries, CHECKED_QUERIES)).long()
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == TORCH:
            shared = shape.query.shape[1] != shape.key.shape[1]
            options = {"is_causal": shape.causal, "scale": shape.scale, "enable_gqa": shared}
            calls[name] = _call(F.scaled_dot_product_attention, tensors, options)
            continue
        variant = VARIANTS[name]
        target, options = variant.call(shape)
        made: Tensor = target(query, key, value, mask, **options)
        given = (made, query, key, value, mask, shape.causal)
        worst = exceeded(*given, scale=shape.scale, only=only, blockwise=variant.blockwise)
        if worst > 1:
            log.warning("attention variant %r is wrong for %s and is not used", name, shape)
            continue
        calls[name] = _call(target, tensors, options)
    return calls


def _call(
    target: Callable[..., object], args: Sequence[object], options: dict[str, object]
) -> Callable[[], object]:
    return lambda: target(*args, **options)


def typical_mask(mask: Tensor) -> Tensor:
    """A mask of the same kind that lets each query see the keys up to its own, or all of them where
    every query sees the same: what models give, and kernels leave work out for."""
    dims = zip(mask.shape, mask.stride(), strict=True)
    stored = [1 if stride == 0 else size for size, stride in dims]
    queries, keys = stored[-2:]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if queries > 1:
        seen = seen.tril(keys - queries)
    made = seen if mask.dtype == torch.bool else torch.where(seen, 0.0, -torch.inf)
    held = torch.empty_strided(stored, mask.stride(), dtype=mask.dtype).copy_(made)
    return held.expand(mask.shape)


def _tensor(kind: TensorKind, size: int, generator: torch.Generator) -> Tensor:
    shape, strides = kind.shape_at(size), kind.strides_at(size)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    values = torch.randn(max(span, 1), generator=generator)
    held = values > -0.5 if kind.dtype == torch.bool else values.to(kind.dtype)
    return held.as_strided(shape, strides)
