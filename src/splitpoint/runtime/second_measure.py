"""What a range was given for its linear layers, timed against Inductor's own in compiled code.

`tuning.linear` measures layers by themselves. In a piece what follows may be fused otherwise, and
what leads by little at the sizes that were measured may be behind at the largest. So where a
choice leads by little, the pieces that hold it are compiled with Inductor's own layers too, and
both are timed in turns over the model's weights, at the ends and the hint of the range. The slower
goes, kind by kind.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..config import Config
from ..graph.pieces import CallPiece, Piece
from ..graph.stitch import CompiledPiece
from ..kernels.memory import streamed_bytes
from ..passes.linear import VARIANTS
from ..passes.linear_sites import LinearShape, find
from ..torch_internals.operators import op_name
from ..torch_internals.sizes import layout_at
from ..tuning.linear import COLD_BYTES, EVICTED_BYTES, INDUCTOR, TIE, LinearTuner
from ..tuning.measure import THREAD_CPU_TIME, Timing, clock_for, interleave
from .lanes import Lane
from .packed_weights import PackedWeights

log = logging.getLogger("splitpoint")

LITTLE = 1.03
"""A layer that by itself is less than so many times as fast as Inductor's is timed again: it costs
a compile, and what leads by more was not seen to be behind."""

LONGEST_S = 0.5
"""At sizes where a call of a piece takes longer, in seconds, none is timed."""

MOST_PIECES = 16
"""Pieces that are compiled a second time at once, at most: those in which least is led by."""


class SecondMeasure:
    """Decides what is in doubt in lanes that are compiled.

    Args:
        config: the program's.
        tuner: which chose the kernels.
        compile: fills `compiled` of lanes with those of the pieces named that are right for all
            sizes of the lane.
    """

    def __init__(
        self,
        config: Config,
        tuner: LinearTuner,
        compile: Callable[[Sequence[tuple[Lane, Sequence[str]]]], None],
    ) -> None:
        self._config = config
        self._tuner = tuner
        self._compile = compile

    def decide(self, lanes: Sequence[Lane]) -> None:
        """Give kinds of layers back to Inductor where its own are faster, and say so in the
        plan.

        Raises:
            CompileError: when the compiler fails.
        """
        doubts = self._doubts(lanes)
        if not doubts:
            return
        if self._tuner.budget.is_spent:
            log.info("no time left to time %d choices again that lead by little", len(doubts))
            return
        self._compile([(doubt.other, doubt.pieces) for doubt in doubts])
        behind: dict[int, dict[LinearShape, float]] = {}
        timer = PieceTimer(PackedWeights(), self._tuner.threads)
        for doubt in doubts:
            lane = doubt.lane
            # What is random in a piece leaves the generator as it was.
            with self._tuner.budget.spending(), torch.random.fork_rng(devices=[]):
                ratios = [
                    ratio
                    for name in doubt.pieces
                    if name in doubt.other.compiled
                    for ratio in timer.ratios(lane, name, doubt.other.compiled[name])
                ]
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            log.info(
                "%s in %s, %.2f times as fast by itself, over Inductor's in compiled code: %s",
                doubt.shape,
                lane.planned.range,
                doubt.lead,
                shown,
            )
            if is_behind(ratios):
                behind.setdefault(id(lane), {})[doubt.shape] = statistics.fmean(ratios)
        for lane in lanes:
            if id(lane) in behind:
                self._give_back(lane, behind[id(lane)])

    def _doubts(self, lanes: Sequence[Lane]) -> list[_Doubt]:
        """The kinds of layers to time again, those with the least lead first."""
        found = []
        for lane in lanes:
            if not lane.sizes or not self._is_measured(lane):
                continue  # of several dimensions random sizes would not go together
            pieces = lane.graph.split.pieces
            kinds = {
                name: {site.shape for site in find(piece, lane.graph.bound_of[name])}
                for name, piece in pieces.items()
                if can_be_called(lane, piece)
            }
            for shape, name in (lane.kernels or {}).items():
                variant = VARIANTS.get(name)
                if variant is None or variant.weights or variant.activations or shape.packed:
                    continue  # Inductor's own would compute something else, or be the same
                lead = self._tuner.lead(shape, lane.planned.range, name)
                within = [name for name, shapes in kinds.items() if shape in shapes]
                if lead < LITTLE and within:
                    found.append(_Doubt(lane, shape, lead, within, _with(lane, [shape])))
        found.sort(key=lambda doubt: doubt.lead)
        sums = itertools.accumulate(len(doubt.pieces) for doubt in found)
        return [doubt for doubt, so_far in zip(found, sums, strict=True) if so_far <= MOST_PIECES]

    def _is_measured(self, lane: Lane) -> bool:
        """Whether its kernels were chosen by measuring, Inductor's own among them."""
        config = self._config
        named = config.linear_for(lane.planned.range)
        return named == "auto" and not (config.batch_invariant or config.free_original_weights)

    def _give_back(self, lane: Lane, behind: dict[LinearShape, float]) -> None:
        made = _with(lane, behind)
        self._compile([(made, list(lane.graph.split.pieces))])
        if made.compiled.keys() != lane.compiled.keys():
            range_ = lane.planned.range
            log.info("%s keeps its kernels: Inductor's are not right for all sizes", range_)
            return
        lane.kernels, lane.prepared = made.kernels, made.prepared
        lane.compiled, lane.artifacts = made.compiled, made.artifacts
        lane.assumptions = made.assumptions
        chosen = {str(s): n for s, n in (lane.kernels or {}).items()}
        summary = chosen if set(chosen.values()) != {INDUCTOR} else {}
        said = ", ".join(f"{shape} ({ratio:.2f}x)" for shape, ratio in behind.items())
        notes = [each for each in (lane.planned.note,) if each]
        notes.append(f"Inductor's own layers are faster in compiled code: {said}")
        lane.planned = replace(lane.planned, linear=summary, note="; ".join(notes))


@dataclass(frozen=True)
class _Doubt:
    """A kind of linear layer in a lane whose kernel leads by little."""

    lane: Lane
    shape: LinearShape
    lead: float
    pieces: Sequence[str]
    """Those that hold such layers and can be called."""
    other: Lane
    """With Inductor's own layers for the kind."""


def _with(lane: Lane, inductor: Sequence[LinearShape] | dict[LinearShape, float]) -> Lane:
    """A lane with Inductor's own layers for some kinds, to compile pieces for."""
    given = {**(lane.kernels or {}), **dict.fromkeys(inductor, INDUCTOR)}
    return replace(lane, kernels=given, prepared={}, artifacts={}, compiled={}, assumptions=())


def can_be_called(lane: Lane, piece: Piece) -> bool:
    """Whether a piece may be called with random values, and nobody sees that it was: integers may
    be indices, operators of others wait for other processes, and updates stay."""
    bound = lane.graph.bound_of[piece.fingerprint]
    others = [value for index, value in enumerate(piece.values) if index not in bound]
    return (
        lane.graph.split.updates is None
        and all(isinstance(v, Tensor) and v.dtype.is_floating_point for v in others)
        and all(map(_is_plain, piece.graph_module.graph.nodes))
    )


def _is_plain(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "output", "call_method")
    name = op_name(node.target)
    return "::" not in name or name.startswith("aten::")


@dataclass
class PieceTimer:
    """Times the pieces of lanes as they are against others' way.

    Each call takes the tensors of the next place in the model that has the piece, so that weights
    come from memory as they do in the model; what a call is given besides is random.
    """

    weights: PackedWeights
    """Copies for measuring alone: few of them."""
    threads: int

    def ratios(self, lane: Lane, name: str, other: CompiledPiece) -> Iterator[float]:
        """How many times as long a lane's own piece takes as another, at the ends and the hint of
        its range, as far as they take no more than a moment; 1 where repeats disagree by more than
        the two do."""
        evicted = streamed_bytes(EVICTED_BYTES)
        for size in sorted({lane.sizes[0], lane.planned.hint, lane.sizes[-1]}):
            with torch.inference_mode(False), torch.no_grad():
                calls = {
                    "own": self._cycling(lane, name, lane.compiled[name], size),
                    "other": self._cycling(lane, name, other, size),
                }
                start = THREAD_CPU_TIME.read()
                calls["own"]()
                if THREAD_CPU_TIME.read() - start > LONGEST_S:
                    return
                timings = interleave(
                    calls,
                    clock=clock_for(self.threads),
                    budget_s=0.05,
                    repeats=7,
                    before=lambda: torch.ops.splitpoint.read_memory(evicted),
                )
            yield _ratio(timings["own"], timings["other"])

    def _cycling(
        self, lane: Lane, name: str, compiled: CompiledPiece, size: int
    ) -> Callable[[], object]:
        piece = lane.graph.split.pieces[name]
        bound = lane.graph.bound_of[name]
        lengths = {"size": size}
        generator = torch.Generator().manual_seed(size)
        made = {
            index: _random(value, *layout_at(value, piece.symbols, lengths), generator)
            for index, value in enumerate(piece.values)
            if index not in bound
        }
        given: list[list[Any]] = [
            [
                made[index] if index in made else self._held(held[index], layout)
                for index, layout in compiled.sources
            ]
            for held in _places(lane, name)
        ]
        following = itertools.cycle(given)
        numbers = [lengths[each] for each in compiled.takes]
        return lambda: compiled.call(*numbers, *next(following))

    def _held(self, tensor: Tensor, layout: str) -> Tensor:
        return tensor if layout == "plain" else self.weights.get(tensor, layout)


def _places(lane: Lane, name: str) -> Iterator[dict[int, Tensor]]:
    """The module's tensors that a piece is given, by index, wherever it is called, until they are
    more than a cache holds."""
    graph, so_far = lane.graph, 0
    index_of = graph.bound_indices()
    for step in graph.split.steps:
        if so_far < COLD_BYTES and isinstance(step, CallPiece) and step.fingerprint == name:
            held = {i: graph.bound[index_of[step.inputs[i]]] for i in graph.bound_of[name]}
            so_far += sum(each.nbytes for each in held.values())
            yield held


def _random(
    like: Tensor, shape: Sequence[int], strides: Sequence[int], generator: torch.Generator
) -> Tensor:
    extent = 1 + sum((length - 1) * each for length, each in zip(shape, strides, strict=True))
    return (
        torch.randn(max(0, extent), generator=generator).to(like.dtype).as_strided(shape, strides)
    )


def _ratio(one: Timing, other: Timing) -> float:
    found = one.median_s / other.median_s
    return found if abs(found - 1) > max(one.spread, other.spread) / 2 else 1.0


def is_behind(ratios: Sequence[float]) -> bool:
    """Whether what takes so many times as long as another goes."""
    return bool(ratios) and statistics.fmean(ratios) > TIE
