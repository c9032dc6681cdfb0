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
from torch import Tensor, nn

from ... import kernels
from ...config import Activations, Weights
from ...kernels import build
from ...kernels.layout import MOST_INT8_DEPTH
from ...kernels.memory import Streamed
from ...tuning.linear import WORTH_ROUNDING
from ...tuning.measure import Budget
from . import names
from .choice import OURS, THEIRS, Choice, Measured, choose
from .chosen import note
from .fence import log
from .measuring import Prepare, measure
from .memory import spare_bytes
from .settings import Settings
from .shapes import HEAD, INT4_NEEDS, TYPES, Shape, kind_for
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
    weights: Weights | None
    """What its weight is rounded to."""
    activations: Activations | None
    """What its input may be rounded to."""

    @property
    def weight(self) -> Tensor:
        """[columns, k]."""
        weight: Tensor = self.module.weight.data
        return weight

    @property
    def shape(self) -> Shape:
        """What its choice depends on."""
        columns, k = self.weight.shape
        stays = not self.may_free
        return Shape(columns, k, self.weight.dtype, stays, self.weights, self.activations)


class Loading:
    """The layers of one model.

    Args:
        theirs: vLLM's function that gives a layer its `cpu_linear`.
        settings: what a user asks for.

    Raises:
        KernelBuildError: when there are no kernels here.
        SharedCores: when threads have no core of their own.
    """

    def __init__(self, theirs: Prepare, settings: Settings) -> None:
        check_threads()
        if not build.place().exists():
            log.info("Splitpoint: building its kernels, once a machine: a minute of CPU time")
        kernels.load()
        self._theirs = theirs
        self.settings = settings
        self._waiting: list[Layer] = []
        self._done: list[str] = []
        """What layers have got, in order."""
        self._seen: set[int] = set()
        """Modules that were put off, by id."""

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
            k = weight.shape[1]
            kind = kind_for(self.settings.weights, k, is_head=not may_free)
            may_round_x = kind is not None and may_free and k <= MOST_INT8_DEPTH
            activations = self.settings.activations if may_round_x else None
            self._waiting.append(Layer(module, may_free, kind, activations))
            self._seen.add(id(module))
            module.cpu_linear = F.linear  # until then
        return takes

    def take_over(self, model: nn.Module) -> None:
        """Give layers their kernels, one after the other; those that are done wait no more.

        Raises:
            OutputMismatch: when no kernel for rounded weights is right here.
        """
        counts = Counter(layer.shape for layer in self._waiting)
        if counts:
            measured, how = self._measured()
            chosen = choices(measured, counts, spare_bytes())
            from .kernel import Setter

            setter = Setter(self._theirs, Streamed())
            while self._waiting:
                layer = self._waiting[0]
                shape = layer.shape  # that of its weight, which may be freed
                choice = chosen[shape]
                setter.set(layer.module, layer.may_free, choice, shape)
                self._done.append(f"{shape.key} {choice.most}")
                del self._waiting[0]
            log.info(
                "Splitpoint: packed kernels for linear layers: %s (%s)", said(chosen, counts), how
            )
        weights = self.settings.weights
        if weights is not None:
            others = self._others(model)
            log.info("Splitpoint: %s", said_of_weights(weights, counts, others))

    def _others(self, model: nn.Module) -> Counter[str]:
        """Modules of other kinds that have weights: how many of which class."""
        return Counter(
            type(module).__name__
            for module in model.modules()
            if getattr(module, "quant_method", None) is not None and id(module) not in self._seen
        )

    def note(self) -> None:
        """Tell vLLM's stores which layers have which kernels."""
        left = [f"{layer.shape.key} left" for layer in self._waiting]
        note(names.CONFIG.value(), [*self._done, *left])

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
            shape: known[shape.key] for shape in weights if shape.key in known
        }
        new = {shape: each for shape, each in weights.items() if shape not in measured}
        if not new:
            return measured, f"measured before: {kept.path}"
        budget = Budget(BUDGET_S)
        found = measure(new, self._theirs, budget)
        how = f"measured in {budget.spent_s:.1f} s"
        try:
            found = kept.add(found)
        except OSError as error:
            how += f"; not kept, as {kept.path} cannot be written: {error.strerror}"
        return measured | found, how


def choices(
    measured: Mapping[Shape, Measured], counts: Mapping[Shape, int], spare: int
) -> dict[Shape, Choice]:
    """A choice for each shape. The layers of a shape keep their weights in both layouts as long as
    the copies take no more than `spare` bytes, those with the fewest bytes first. A weight that
    stays as it is gets no two copies beside. What rounds x must be worth its error."""
    chosen: dict[Shape, Choice] = {}
    for shape in sorted(counts, key=lambda shape: shape.nbytes * counts[shape]):
        size = shape.second_bytes * counts[shape]
        times = measured.get(shape, {})
        if shape.activations is not None:
            times = {rows: (own, WORTH_ROUNDING * other) for rows, (own, other) in times.items()}
        may_keep_both = size <= spare and not (size and shape.stays)
        missing = THEIRS if shape.weights is None else OURS
        chosen[shape] = choose(times, may_keep_both) if times else missing
        if chosen[shape].keeps_both:
            spare -= size
    return chosen


def said(chosen: Mapping[Shape, Choice], counts: Mapping[Shape, int]) -> str:
    """Which layers got what, in one line."""
    return ", ".join(
        f"{counts[shape]} of {shape} {choice.said(shape.other)}" for shape, choice in chosen.items()
    )


def said_of_weights(
    weights: Weights, counts: Mapping[Shape, int], others: Mapping[str, int]
) -> str:
    """How many layers are rounded, and which are not, in one line."""
    rounded: Counter[str] = Counter()
    for shape, count in counts.items():
        if shape.weights is not None:
            rounded[shape.weights] += count
    left = [
        f"{count} of {shape} ({INT4_NEEDS})"
        for shape, count in counts.items()
        if shape.weights is None
    ]
    left += [f"{count} {name} (no matrix in bf16 or fp32)" for name, count in others.items()]
    what = ", ".join(f"{count} layers in {kind}" for kind, count in sorted(rounded.items()))
    head = f"; heads are in {HEAD}" if rounded[HEAD] and weights != HEAD else ""
    return f"weights rounded: {what or 'none'}{head}; left as they are: {', '.join(left) or 'none'}"
