"""Which kernel a layer's calls get, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

NOISE = 1.05
"""Kernels whose times differ by less count as equally fast."""

Measured = Mapping[int, tuple[float, float]]
"""Seconds a call of this package's kernel and of vLLM's own, by rows of x."""


@dataclass(frozen=True)
class Choice:
    """This package's kernel for up to `most` rows; for more vLLM's own or, of a rounded weight, its
    product with what was unpacked."""

    most: int | None
    """None: for any rows; 0: for none."""

    @property
    def keeps_both(self) -> bool:
        """Whether a layer needs its weight in both layouts."""
        return self.most is not None and self.most > 0

    def said(self, rounds: bool = False) -> str:
        """In words, of a layer whose weight is rounded or not."""
        if self.keeps_both:
            return f"up to {self.most} rows" + (", unpacked for more" if rounds else "")
        if self.most is None:
            return "any rows"
        return "unpacked at each call" if rounds else "left to vLLM"


OURS, THEIRS = Choice(None), Choice(0)


def choose(measured: Measured, may_keep_both: bool) -> Choice:
    """The choice with the least loss against the faster kernel at each of the measured rows, as a
    geometric mean. Weights in two layouts must gain more than noise at some of them."""
    rows = sorted(measured)
    if not rows:
        return THEIRS
    ours = [_loss(*measured[each]) for each in rows]
    theirs = [_loss(*reversed(measured[each])) for each in rows]
    single = OURS if sum(ours) <= sum(theirs) else THEIRS
    if not may_keep_both:
        return single
    cuts = range(len(rows) + 1)  # this package's kernel for the first so many
    best = min(cuts, key=lambda cut: (sum(ours[:cut]) + sum(theirs[cut:]), -cut))
    losses = ours if single is OURS else theirs
    kept = ours[:best] + theirs[best:]
    if max(a - b for a, b in zip(losses, kept, strict=True)) <= 0:
        return single
    if best in (0, len(rows)):
        return THEIRS if best == 0 else OURS
    return Choice(math.isqrt(rows[best - 1] * rows[best]))


def _loss(mine: float, other: float) -> float:
    """How much longer a kernel takes than another, as a logarithm; 0 for noise and less."""
    ratio = math.inf if math.isinf(mine) else mine / other
    return math.log(ratio) if ratio > NOISE else 0.0
