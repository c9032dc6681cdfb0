"""A captured graph as a program holds it, and a range with the function that serves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..capture.assumptions import Assumption
from ..capture.dims import Lengths
from ..capture.module_state import ModuleState
from ..capture.sources import Argument, Bound, SizeInput
from ..graph.pieces import CallPiece, Name, Split
from ..graph.stitch import Body, CompiledPiece, Stitched
from ..kernels.devices import CPU, Device, device_row
from ..passes.attention import AttentionShape
from ..passes.linear import Prepared
from ..passes.linear_sites import LinearShape, Site, find
from ..ranges import PlannedRange

if TYPE_CHECKING:
    from .recorded import RecordedLane


@dataclass(eq=False)
class Graph:
    """One captured graph, split, with where its inputs come from."""

    split: Split
    """Without steps when `is_loaded`: its lanes are compiled already."""
    inputs: Sequence[Argument | Bound | SizeInput]
    argument_count: int
    result: tuple[Sequence[Any], Any] | None = None
    state: ModuleState = field(default_factory=ModuleState)
    """The module as it was at capture, with the tensors that are bound."""
    piece_count: int = 0
    """Pieces, equal ones counted each."""
    conditions: tuple[Assumption, ...] = ()
    """What it needs of several dimensions; where there is one, its lanes' sizes say it."""
    unique: tuple[str, ...] = ()
    """Fingerprints of the pieces that differ."""
    bound_of: dict[str, frozenset[int]] = field(default_factory=dict)
    """By piece: which of its inputs are tensors that the module holds, at every call of it."""
    argument_names: Sequence[str] = ()
    """What messages call the tensor arguments."""
    device: torch.device = CPU
    """Where its tensors are."""
    is_loaded: bool = False
    """Whether it comes from a store, so that nothing more can be compiled from it."""

    def __post_init__(self) -> None:
        self.piece_count = self.piece_count or self.split.piece_count
        self.unique = self.unique or tuple(self.split.pieces)
        names = {
            name
            for name, source in zip(self.split.inputs, self.inputs, strict=True)
            if isinstance(source, Bound)
        }
        for fingerprint in self.split.pieces:
            calls = [
                step.inputs
                for step in self.split.steps
                if isinstance(step, CallPiece) and step.fingerprint == fingerprint
            ]
            self.bound_of[fingerprint] = frozenset(
                index for index, _ in enumerate(calls[0]) if all(c[index] in names for c in calls)
            )

    def bound_indices(self) -> dict[str, int]:
        """Which of `bound` each input of the graph is, by its name, where it is one."""
        return {
            name: source.index
            for name, source in zip(self.split.inputs, self.inputs, strict=True)
            if isinstance(source, Bound)
        }

    def linear_sites(self) -> Iterator[tuple[Site, tuple[torch.Tensor, ...]]]:
        """The linear layers of all pieces, equal pieces counted each, with their weights."""
        index_of = self.bound_indices()
        found = {
            fingerprint: find(piece, self.bound_of[fingerprint])
            for fingerprint, piece in self.split.pieces.items()
        }
        for step in self.split.steps:
            if isinstance(step, CallPiece):
                for site in found[step.fingerprint]:
                    names = [step.inputs[index] for index in site.weights]
                    yield site, tuple(self.bound[index_of[name]] for name in names)

    @property
    def row(self) -> Device:
        """What applies where its tensors are."""
        return device_row(self.device)

    def last_layers(self) -> set[LinearShape]:
        """The shapes of the layers whose results the graph returns, if need be after what has one
        operand, such as a view or a function of each element."""
        returned = {value.name for value in self.split.outputs if isinstance(value, Name)}
        found: set[LinearShape] = set()
        for step in self.split.steps:
            if not isinstance(step, CallPiece) or returned.isdisjoint(step.outputs):
                continue
            piece = self.split.pieces[step.fingerprint]
            sites = find(piece, self.bound_of[step.fingerprint])
            of = {node: site.shape for site in sites for node in site.outputs}
            made: Any = piece.graph_module.graph.output_node().args[0]
            for node, name in zip(made, step.outputs, strict=True):
                while name in returned and node not in of and len(node.all_input_nodes) == 1:
                    (node,) = node.all_input_nodes
                if name in returned and node in of and not of[node].residual:
                    found.add(of[node])
        return found

    def serves(self, lengths: Lengths) -> bool:
        """Whether it is right for lengths of the dynamic dimensions."""
        return all(condition.holds(*lengths) for condition in self.conditions)

    @property
    def bound(self) -> list[Any]:
        """The module's tensors that the graph reads."""
        found: list[Any] = self.state.bound
        return found


@dataclass(eq=False)
class Lane:
    """One line of the plan at run time: a range, its graph, and its function."""

    planned: PlannedRange
    graph: Graph
    sizes: Sequence[int]
    """The sizes it serves, ascending: those of its range without the single sizes in it. Of
    several dimensions, none: `fits` says it."""
    run: Stitched | None = None
    kernels: dict[LinearShape, str] | None = None
    """The kernel of each shape of linear layer; None while it is not chosen."""
    attention: dict[AttentionShape, str] | None = None
    """The kernel of each shape of attention; None while it is not chosen."""
    packed: tuple[tuple[int, str], ...] = ()
    """The packed weights that `run` reads, by `Bound.index` and layout, in that order."""
    body: Body | None = None
    """What `run` does; there before it where another thread compiled it."""
    recorded: RecordedLane | None = None
    """What serves calls in place of `run`, where some of its sizes are recorded."""
    assumptions: tuple[Assumption, ...] = ()
    """What `run` needs of the size, beyond the bounds of the range."""
    prepared: dict[str, tuple[Prepared, list[int]]] = field(default_factory=dict)
    """By piece: it with the kernels chosen, and which of its inputs need no check at a call."""
    compiled: dict[str, CompiledPiece] = field(default_factory=dict)
    """By piece: what was made of it."""
    artifacts: dict[str, str | None] = field(default_factory=dict)
    """By piece: the key of its artifact in the store; None where it could not be kept."""

    @property
    def is_exact(self) -> bool:
        """Whether it is for one length of each of several dimensions."""
        return bool(self.planned.lengths) and all(a == b for _, a, b, _ in self.planned.lengths)

    def fits(self, lengths: Lengths, size: int) -> bool:
        """Whether it is for lengths of several dimensions, as far as is known before it is
        compiled."""
        planned = self.planned
        return (
            size in planned.range
            and all(
                first <= length <= last
                for length, (_, first, last, _) in zip(lengths, planned.lengths, strict=True)
            )
            and self.graph.serves(lengths)
        )
