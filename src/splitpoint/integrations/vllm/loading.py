"""Give the layers of a model that vLLM has just loaded their kernels.

While vLLM goes through the layers, those that there are kernels for are only noted; then their
shapes are measured, or looked up, and each layer gets its kernel. So a weight is in memory once
at a time, but for the one that is being packed, and what was measured decides for all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ...kernels import build
from ...kernels.memory import Streamed
from ...tuning.measure import Budget
from .choice import Choice, Measured, choose
from .fence import log
from .measuring import Prepare, measure
from .memory import spare_bytes
from .shapes import TYPES, Shape
from .store import Kept
from .threads import check_threads

BUDGET_S = 5.0
"""CPU seconds that measuring a model's layers may take."""


@dataclass(frozen=True)
class Layer:
    """A layer that waits for its kernel."""

    module: Any
    """A torch module of vLLM's, with `weight` and what is to be set, `cpu_linear`."""
    may_free: bool
    """Whether nobody reads the module's weight as it is."""

    @property
    def weight(self) -> Tensor:
        """[columns, k]."""
        weight: Tensor = self.module.weight.data
        return weight

    @property
    def shape(self) -> Shape:
        """What its choice depends on."""
        columns, k = self.weight.shape
        return Shape(columns, k, self.weight.dtype, stays=not self.may_free)


class Loading:
    """The layers of one model.

    Raises:
        KernelBuildError: when there are no kernels here.
        SharedCores: when threads have no core of their own.
    """

    def __init__(self, theirs: Prepare) -> None:
        check_threads()
        if not build.place().exists():
            log.info("Splitpoint: building its kernels, once a machine: a minute of CPU time")
        kernels.load()
        self._theirs = theirs
        self._waiting: list[Layer] = []

    def puts_off(self, module: Any, may_free: bool) -> bool:
        """Note a layer, if there is a kernel for it."""
        weight = module.weight
        takes = (
            weight.device.type == "cpu"
            and weight.ndim == 2
            and weight.dtype in TYPES
            and weight.numel() > 0
        )
        if takes:
            self._waiting.append(Layer(module, may_free))
            module.cpu_linear = F.linear  # until then
        return takes

    def take_over(self) -> None:
        """Give layers their kernels, one after the other; those that are done wait no more."""
        if not self._waiting:
            return
        counts = Counter(layer.shape for layer in self._waiting)
        measured, how = self._measured()
        chosen = choices(measured, counts, spare_bytes())
        from .kernel import Setter

        setter = Setter(self._theirs, Streamed())
        while self._waiting:
            layer = self._waiting[0]
            setter.set(layer.module, layer.may_free, chosen[layer.shape])
            del self._waiting[0]
        log.info(
            "Splitpoint: packed kernels for linear layers: %s (%s)", summary(chosen, counts), how
        )

    def leave_the_rest(self) -> None:
        """Leave the layers that still wait to vLLM."""
        for layer in self._waiting:
            self._theirs(layer.module, layer.may_free)

    def _measured(self) -> tuple[dict[Shape, Measured], str]:
        """Times of each shape, and where they are from."""
        weights: dict[Shape, list[Tensor]] = {}
        for layer in self._waiting:
            weights.setdefault(layer.shape, []).append(layer.weight)
        kept = Kept()
        known = kept.read()
        measured: dict[Shape, Measured] = {
            shape: known[str(shape)] for shape in weights if str(shape) in known
        }
        new = {shape: each for shape, each in weights.items() if shape not in measured}
        if not new:
            return measured, f"measured before: {kept.path}"
        budget = Budget(BUDGET_S)
        found = measure(new, self._theirs, budget)
        how = f"measured in {budget.spent_s:.1f} s"
        try:
            kept.add(found)
        except OSError as error:
            how += f"; not kept, as {kept.path} cannot be written: {error.strerror}"
        return measured | found, how


def choices(
    measured: Mapping[Shape, Measured], counts: Mapping[Shape, int], spare: int
) -> dict[Shape, Choice]:
    """A choice for each shape. The layers of a shape keep their weights in both layouts as long as
    the copies take no more than `spare` bytes, those with the fewest bytes first. A weight that
    stays as it is gets no two copies beside."""
    chosen: dict[Shape, Choice] = {}
    for shape in sorted(counts, key=lambda shape: shape.nbytes * counts[shape]):
        size = shape.nbytes * counts[shape]
        chosen[shape] = choose(measured.get(shape, {}), size <= spare and not shape.stays)
        if chosen[shape].keeps_both:
            spare -= size
    return chosen


def summary(chosen: Mapping[Shape, Choice], counts: Mapping[Shape, int]) -> str:
    """Which layers got what, in one line."""
    return ", ".join(f"{counts[shape]} of {shape} {choice}" for shape, choice in chosen.items())
