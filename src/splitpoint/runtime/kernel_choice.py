"""Which kernel each range gives its linear layers and its attention: asked for, or measured."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from .. import kernels
from ..config import Config
from ..errors import KernelBuildError, NothingToRound
from ..kernels.int4 import PREFERRED_GROUPS
from ..passes import attention, linear
from ..passes.batch_invariance import refuse_attention, refuse_layer
from ..passes.linear_sites import LinearShape
from ..ranges import Range
from ..tuning.attention import AttentionTuner
from ..tuning.linear import LinearTuner
from ..tuning.measure import Budget
from .lanes import Graph, Lane

log = logging.getLogger("splitpoint")


def refuse_nothing_to_round(config: Config, graphs: Sequence[Graph]) -> None:
    """Refuse `Config.activations` for a model without a layer that could have them.

    Raises:
        NothingToRound: where that is so.
    """
    if config.activations is None or any(
        _can_round(config, site.shape, site.shape in last)
        for graph, last in ((graph, _last_layers(config, graph)) for graph in graphs)
        for site, _ in graph.linear_sites()
    ):
        return
    beside = "" if config.weights else "give weights='int8' or 'int4' beside it, or "
    raise NothingToRound(
        f"activations={config.activations!r} is for linear layers on CPU in float32 or bfloat16 "
        f"whose weights are int8 with one factor a column or 4 bits, and the model has none\n"
        f"{beside}leave it out"
    )


def _last_layers(config: Config, graph: Graph) -> Collection[LinearShape]:
    """The layers that are made int8 where the others are made int4."""
    return graph.last_layers() if config.weights == "int4" else ()


def _weights_of(config: Config, shape: LinearShape, is_last: bool) -> str:
    """What the weights of layers are to be made: a key of `Variant.weights`."""
    if shape.is_quantised:
        return ""  # are so already
    return "int8" if is_last else config.weights or ""


def _can_round(config: Config, shape: LinearShape, is_last: bool) -> bool:
    weights = _weights_of(config, shape, is_last)
    found = linear.admitted(shape, weights, config.activations or "")
    return any(variant.activations for variant in found)


class KernelChoice:
    """Chooses for the lanes of one program, with one budget for all measuring."""

    def __init__(self, config: Config) -> None:
        self._config = config
        budget = Budget(config.linear_budget_s)
        self.linear_tuner = LinearTuner(torch.get_num_threads(), budget)
        self.attention_tuner = AttentionTuner(torch.get_num_threads(), budget)
        self._reserved: dict[tuple[int, str], int] = {}
        """Bytes of the packed copies that lanes need, by the weight's id and layout."""
        self._warned = False

    def choose(self, lanes: Sequence[Lane]) -> None:
        """Choose the kernels of each lane."""
        self._choose_tuning(lanes)
        # Attention first: it takes a fraction of a second, and linear layers may take all there is.
        self._choose_attention(lanes)
        self._choose_linear(lanes)

    def _choose_tuning(self, lanes: Sequence[Lane]) -> None:
        """Have Inductor tune its kernels where that is asked for, or is worth its time: of static
        sizes, on devices where it has something to choose among."""
        for lane in lanes:
            range_, tuned = lane.planned.range, lane.graph.row.autotuned
            named = self._config.linear_for(range_)
            if tuned and (named == "autotuned" or (named == "auto" and range_.is_single_size)):
                options = {**tuned, **lane.planned.options}
                lane.planned = replace(lane.planned, options=options)

    def _choose_attention(self, lanes: Sequence[Lane]) -> None:
        """Choose a kernel for each shape of attention in each lane, and note it in the plan."""
        for lane in lanes:
            named = self._config.attention_for(lane.planned.range)
            if self._config.batch_invariant:
                named = self._invariant_attention(lane)
            if named == "torch" or self._config.backend == "eager" or lane.attention is not None:
                continue
            lane.attention = {}
            shapes = dict.fromkeys(shape for _, shape in attention.find(lane.graph.split))
            if not shapes or not self._kernels_available():
                continue
            for shape in shapes:
                name = named
                if named == "auto":
                    name = self.attention_tuner.choose(shape, lane.planned.range)
                variant = attention.VARIANTS.get(name)
                fits = variant is not None and variant.fits(shape)
                lane.attention[shape] = name if fits else "torch"
            if set(lane.attention.values()) != {"torch"}:
                summary = {str(shape): name for shape, name in lane.attention.items()}
                lane.planned = replace(lane.planned, attention=summary)

    def _invariant_attention(self, lane: Lane) -> str:
        """The variant for a lane whose rows must not depend on each other.

        Raises:
            NotBatchInvariant: where there is attention that it does not fit.
        """
        variant = next(v for v in attention.VARIANTS.values() if v.batch_invariant)
        for step in attention.others(lane.graph.split):
            refuse_attention(str(step.output))
        for _, shape in attention.find(lane.graph.split):
            if not variant.fits(shape):
                refuse_attention(str(shape))
        return variant.name

    def _choose_linear(self, lanes: Sequence[Lane]) -> None:
        """Choose a kernel for each shape of linear layer in each lane, and note it in the
        plan."""
        asked: dict[tuple[LinearShape, int], dict[tuple[int, ...], tuple[torch.Tensor, ...]]] = {}
        for index, lane in enumerate(lanes):
            if (
                self._config.linear_for(lane.planned.range) == "inductor"
                or lane.kernels is not None
            ):
                continue
            lane.kernels = {}
            for site, held in lane.graph.linear_sites():
                asked.setdefault((site.shape, index), {})[tuple(map(id, held))] = held
        if self._config.backend == "eager" or not asked or not self._kernels_available():
            return
        # The tuner wants all that concerns a kind of layer together; of that the largest sizes
        # come first: they gain most by a copy, which smaller ones then have for nothing.
        last: set[tuple[int, LinearShape]] = set()
        for graph in {id(lane.graph): lane.graph for lane in lanes}.values():
            last |= {(id(graph), shape) for shape in _last_layers(self._config, graph)}
        stays: dict[int, list[str]] = {}
        kinds = list(dict.fromkeys(shape.of_any_rows for shape, _ in asked))
        for shape, index in sorted(
            asked, key=lambda at: (kinds.index(at[0].of_any_rows), -lanes[at[1]].planned.range.end)
        ):
            lane = lanes[index]
            assert lane.kernels is not None
            weights = _weights_of(self._config, shape, (id(lane.graph), shape) in last)
            given = asked[shape, index]
            lane.kernels[shape] = self._choice(shape, lane.planned.range, given, weights)
            if self._config.weights and lane.kernels[shape] == "inductor":
                stays.setdefault(index, []).append(f"{shape} {self._why(shape, weights)}")
        self.linear_tuner.free()
        for index, lane in enumerate(lanes):
            if lane.kernels and set(lane.kernels.values()) != {"inductor"}:
                summary = {str(shape): name for shape, name in lane.kernels.items()}
                lane.planned = replace(lane.planned, linear=summary)
            notes = [each for each in (lane.planned.note,) if each]
            if index in stays:
                notes.append(f"not in {self._config.weights}: {', '.join(stays[index])}")
            if self._config.activations and lane.kernels:
                notes.append(self._rounded_in(lane))
            lane.planned = replace(lane.planned, note="; ".join(notes))

    def _rounded_in(self, lane: Lane) -> str:
        """What a plan says of the layers whose activations are rounded in a lane."""
        activations = self._config.activations
        found = [
            str(shape)
            for shape, name in (lane.kernels or {}).items()
            if name in linear.VARIANTS and linear.VARIANTS[name].activations
        ]
        if not found:
            last = _last_layers(self._config, lane.graph)
            can = any(
                _can_round(self._config, shape, shape in last) for shape in lane.kernels or {}
            )
            why = "it is not faster" if can else "no layer has int8 or 4-bit weights"
            return f"no activations in {activations}: {why}"
        off = "within 1/254 of a row's largest value"
        return f"activations in {activations} ({off}): {', '.join(found)}"

    def _why(self, shape: LinearShape, weights: str) -> str:
        """Why layers keep their weights although something else was asked for."""
        if shape.is_quantised:
            return "(the weights are quantised already)"
        if not any(v.weights == weights and v.fits(shape) for v in linear.VARIANTS.values()):
            return f"(no group of {' or '.join(map(str, PREFERRED_GROUPS))} divides {shape.k})"
        if self._config.max_packed_bytes is None:
            return "(no kernel was right, as the log says)"
        return "(a copy would exceed max_packed_bytes)"

    def _choice(
        self,
        shape: LinearShape,
        range_: Range,
        held: Mapping[tuple[int, ...], tuple[torch.Tensor, ...]],
        weights: str,
    ) -> str:
        """The variant for the layers of one shape, whose weights, by their ids, are these."""
        name = self._config.linear_for(range_)
        activations = self._config.activations or ""
        invariant = self._config.batch_invariant
        fitting = linear.admitted(shape, weights, activations, invariant)
        if invariant and not any(v.batch_invariant for v in fitting):
            refuse_layer(str(shape))
        if name == "auto" and fitting:
            ids = {each for site in held for each in site}
            layouts = {layout for each, layout in self._reserved if each in ids}
            only_copies = self._config.free_original_weights
            name = self.linear_tuner.choose(
                shape,
                range_,
                layouts,
                only_copies,
                [*held.values()],
                weights,
                activations,
                invariant,
            )
        variant = linear.VARIANTS.get(name)
        if variant is None or not variant.fits(shape):
            return "inductor"
        needed = {
            (each, layout): size
            for layout in linear.layouts_of(variant, shape)
            if layout != "plain"
            for site in held
            for each, size in zip(site, linear.nbytes(shape, layout), strict=True)
        }
        room = self._config.max_packed_bytes
        if room is not None and sum((self._reserved | needed).values()) > room:
            log.info("%s for %s would exceed max_packed_bytes", name, shape)
            return "inductor"
        self._reserved |= needed
        return name

    def _kernels_available(self) -> bool:
        try:
            kernels.load()
        except KernelBuildError as error:
            config = self._config
            if config.weights or config.batch_invariant or config.activations:
                raise  # nothing else computes so
            if not self._warned:
                log.warning("linear layers stay with Inductor, attention with torch: %s", error)
                self._warned = True
            return False
        return True
