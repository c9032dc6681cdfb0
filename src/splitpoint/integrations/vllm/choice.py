"""Which kernel a layer's calls get, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .shapes import Other

NOISE = 1.05
"""Kernels whose times differ by less count as equally fast."""

Measured = Mapping[int, tuple[float, float]]
"""Seconds a call of this package's kernel, and the other way that a layer has (`Shape.other`), by
rows of x."""

SAID: dict[Other, tuple[str, str]] = {
    "vLLM": ("", "left to vLLM"),
    "unpacked": (", unpacked for more", "unpacked at each call"),
    "x in int8": (", with x in int8 for more", "with x in int8"),
}
"""Of the other way: what is said where it serves more rows, and where it serves all."""


@dataclass(frozen=True)
class Choice:
    """This package's kernel for up to `most` rows; for more the other way."""

    most: int | None
    """None: for any rows; 0: for none."""

    @property
    def keeps_both(self) -> bool:
        """Whether a layer goes both ways."""
        return self.most is not None and self.most > 0

    def said(self, other: Other = "vLLM") -> str:
        """In words, of a layer that has another way."""
        beyond, always = SAID[other]
        if self.keeps_both:
            return f"up to {self.most} rows{beyond}"
        return "any rows" if self.most is None else always


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
