"""What `splitpoint bench forward` compares: compiled from an empty cache, and checked."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import CompiledModel, Config, compile, kernels
from ..errors import BaselineFailed, OutputMismatch
from ..passes.linear import VARIANTS
from ..ranges import Range
from ..torch_internals.inductor import fresh_inductor_cache
from .baseline import Baseline, Built, Rounding, Setting
from .baselines import BASELINES
from .check import Expected
from .cost import Cost, cost_of
from .inputs import Forward, call_each, last_logits

Say = Callable[[str], None]

ONLY = "only "
"""Before the name of a kernel that serves all sizes."""


@dataclass
class Entrants:
    """What is compared, and what was learnt about it on the way."""

    expected: Expected
    forwards: dict[str, Forward] = field(default_factory=dict)
    """What serves all sizes, by name, checked."""
    per_size: list[tuple[Baseline, Setting, Any]] = field(default_factory=list)
    """What is built for one size after the other, with the model as it wants it."""
    costs: dict[str, Cost] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """The worst error of the logits, by name."""
    notes: list[str] = field(default_factory=list)

    asked: list[tuple[Baseline, Setting]] = field(default_factory=list)
    """The baselines that were asked for."""
    rounded: dict[Rounding, Expected] = field(default_factory=dict)
    """What those are compared with that round in ways of their own."""

    @property
    def whole(self) -> list[str]:
        """Those that read no fewer bytes of weights than splitpoint, by name."""
        own = {baseline.name for baseline, setting in self.asked if baseline.rounds(setting)}
        return [name for name in self.errors if name not in own]

    def add(
        self,
        name: str,
        forward: Forward,
        sizes: Sequence[int] | None = None,
        expected: Expected | None = None,
    ) -> Forward:
        """Check the outputs of a forward, at all sizes or some; raises `OutputMismatch`."""
        error = (expected or self.expected).check(name, forward, sizes)
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        return forward

    def built(
        self, baseline: Baseline, setting: Setting, prepared: Any, sizes: Sequence[int]
    ) -> Built | None:
        """A baseline compiled for some sizes and checked; None where it failed, with a note."""
        try:
            with fresh_inductor_cache():
                forward, cost = cost_of(lambda: baseline.build(prepared, sizes))
        except BaselineFailed as error:
            self.notes.append(str(error))
            return None
        try:
            self.add(baseline.name, forward, sizes, self._expected_of(baseline, setting))
        except OutputMismatch as error:
            self.notes.append(f"{error}.")
            baseline.release(forward)
            return None
        before = self.costs.get(baseline.name, Cost(0.0, 0.0))
        self.costs[baseline.name] = Cost(before.cpu_s + cost.cpu_s, before.wall_s + cost.wall_s)
        return forward

    def _expected_of(self, baseline: Baseline, setting: Setting) -> Expected | None:
        own = baseline.rounds(setting)
        if own is None:
            return None
        if own not in self.rounded:
            self.rounded[own] = Expected(
                setting.model,
                self.expected.sizes,
                own.weights,
                own.activations,
                own_rounding=True,
            )
        note = (
            f"{baseline.name} rounds in a way of its own ({own}): it was compared with the model "
            f"as it is, and may be off by {self.rounded[own].limit:.2g} of the logits' norm, twice "
            f"what splitpoint's rounding makes of them."
        )
        if note not in self.notes:  # one that is built for each size comes here each time
            self.notes.append(note)
        return self.rounded[own]

    def built_for(self, size: int, say: Say) -> dict[str, Built]:
        """What is built for one size, by name, without those that failed; to be released before
        the next size, as each may hold a copy of the weights."""
        found = {}
        for baseline, setting, prepared in self.per_size:
            say(f"{baseline.name}: compiling for size {size} ...")
            if (forward := self.built(baseline, setting, prepared, [size])) is not None:
                found[baseline.name] = forward
        return found

    def release(self, built: Mapping[str, Built]) -> None:
        """Free what `built_for` returned."""
        for name, forward in built.items():
            BASELINES[name].release(forward)
        gc.collect()  # modules hold cycles, and with them their weights

    def add_singles(self, model: Any, config: Config, sizes: Sequence[int], say: Say) -> None:
        """Splitpoint with one range and one kernel, once for each that is meant for all sizes."""
        for kernel in single_kernels(config.max_size):
            name = ONLY + kernel
            say(f"splitpoint with one range and {name}: compiling ...")
            compiled, cost = compile_cold(model, one_kernel(config, kernel), sizes)
            used = {each for entry in compiled.plan.entries for each in entry.linear.values()}
            if kernel != "inductor" and kernel not in used:
                self.notes.append(f"{name} was left out: it can run none of the linear layers.")
                continue
            self.costs[name] = cost
            self.forwards[name] = self.add(name, last_logits(compiled))

    def add_baselines(
        self, setting: Setting, names: Sequence[str], sizes: Sequence[int], say: Say
    ) -> None:
        """The baselines of these names, as far as they are installed."""
        self.asked += [(BASELINES[name], setting) for name in names]
        for baseline in (BASELINES[name] for name in names):
            if reason := baseline.unavailable(setting):
                self.notes.append(f"{baseline.name} was left out: {reason}.")
                continue
            say(f"{baseline.name}: preparing ...")
            try:
                prepared = baseline.prepare(setting)
            except BaselineFailed as error:
                self.notes.append(f"{baseline.name} was left out: {error}.")
                continue
            if baseline.per_size:
                self.per_size.append((baseline, setting, prepared))
                continue
            say(f"{baseline.name}: compiling ...")
            if (forward := self.built(baseline, setting, prepared, sizes)) is not None:
                self.forwards[baseline.name] = forward


def compile_cold(model: Any, config: Config, sizes: Sequence[int]) -> tuple[CompiledModel, Cost]:
    """Splitpoint, every range compiled from an empty cache and called at each of the sizes."""
    compiled = compile(model, config, dynamic_dims={"input_ids": 1})
    with fresh_inductor_cache():
        _, cost = cost_of(lambda: call_each(last_logits(compiled), sizes))
    return compiled, cost


def single_kernels(max_size: int) -> list[str]:
    """The kernels that are meant for all sizes."""
    if not kernels.available():
        return ["inductor"]
    everywhere = Range(1, max_size)
    own = [
        name
        for name, v in VARIANTS.items()
        if v.promises(everywhere) and not (v.weights or v.activations)
    ]
    return ["inductor", *own]


def one_kernel(config: Config, kernel: str) -> Config:
    """The configuration with one range, and one kernel for its linear layers."""
    return replace(
        config,
        split_points=(),
        compile_sizes=(),
        on_guard="split",
        weights=None,
        activations=None,
        linear={f"1-{config.max_size}": kernel},
    )
