"""Split a captured graph at its splitting ops, and find the pieces that are equal."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..capture.dims import SIZE_ALONE, Dims
from ..errors import OutsideGraph, UnsupportedGraph
from ..torch_internals.layouts import ALONE, made_contiguous
from ..torch_internals.operators import GRAD_STATE, PAIRED_STATE, op_name
from ..torch_internals.sizes import (
    Symbols,
    as_nodes,
    expression_of,
    in_terms_of_size,
    python_code,
    symbols_in,
)
from .fingerprint import attribute, fingerprint
from .names import methods_as_operators, splitting_names
from .overlap import Updates, extent, updates_of
from .updates import updated_inputs, writes, written
from .views import ancestry, calls_for, in_memory_of, same_object, views_among

if TYPE_CHECKING:
    import sympy

SHAPE, DTYPE = "splitpoint_shape", "splitpoint_dtype"
"""Keys of a piece's `node.meta`: what is known of a tensor without a ShapeEnv. A dimension is an
expression over the symbols of the dynamic ones."""


@dataclass(frozen=True)
class Size:
    """An integer that follows from the dynamic dimensions."""

    expr: sympy.Basic

    @property
    def code(self) -> str:
        """Python over their names."""
        return python_code(self.expr)


@dataclass(frozen=True)
class TensorKind:
    """What is known of a tensor without a ShapeEnv."""

    shape: tuple[Any, ...]
    """Expressions over the symbols of the dynamic dimensions, as the strides."""
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: str
    dims: Dims = SIZE_ALONE

    def shape_at(self, size: int) -> tuple[int, ...]:
        """The shape in a call of a size."""
        return self._at(self.shape, size)

    def strides_at(self, size: int) -> tuple[int, ...]:
        """The strides in a call of a size."""
        return self._at(self.strides, size)

    def _at(self, expressions: Sequence[sympy.Basic], size: int) -> tuple[int, ...]:
        names = {**self.dims.values(size), "math": math}
        return tuple(int(eval(Size(e).code, dict(names))) for e in expressions)


@dataclass(frozen=True)
class Piece:
    """A subgraph without splitting ops: what is compiled, once per range."""

    graph_module: fx.GraphModule
    """Takes the dimensions `takes`, then the tensors; returns a tuple of tensors."""
    values: tuple[Any, ...]
    """The captured (fake) value of each input tensor."""
    takes: tuple[str, ...]
    """The dynamic dimensions that it is given."""
    symbols: Symbols
    """What the symbols in `values` mean."""
    fingerprint: str
    """Equal for pieces that compute the same from the same kinds of inputs."""
    dims: Dims = SIZE_ALONE


@dataclass(frozen=True)
class CallPiece:
    """A step of the whole: call a piece."""

    fingerprint: str
    inputs: tuple[str, ...]
    """Names of the tensors passed."""
    outputs: tuple[str, ...]
    """Names that the returned tensors get."""


@dataclass(frozen=True)
class CallOp:
    """A step of the whole: call a splitting op, or take an element of what one returned."""

    target: Any
    args: tuple[Any, ...]
    """May hold `Name`, `Size`, and containers of them."""
    kwargs: dict[str, Any]
    output: str
    tensors: Mapping[str, TensorKind] = field(default_factory=dict)
    """What is known of the tensors among the arguments and of the output, by name."""


@dataclass(frozen=True)
class Name:
    """A value made by an earlier step, or a graph input."""

    name: str


@dataclass(frozen=True)
class Split:
    """A graph as steps over few unique pieces."""

    inputs: tuple[str, ...]
    """Names of the graph's inputs, in order."""
    steps: tuple[CallPiece | CallOp, ...]
    outputs: tuple[Any, ...]
    """`Name`, `Size` or a constant for each graph output."""
    pieces: dict[str, Piece]
    """The unique pieces by fingerprint."""
    updates: Updates | None = None
    """What of the graph's inputs is updated in place, if anything."""
    dims: Dims = SIZE_ALONE

    @property
    def piece_count(self) -> int:
        """How many pieces the graph has, equal ones counted each."""
        return sum(isinstance(step, CallPiece) for step in self.steps)


@dataclass
class _Segment:
    """Consecutive nodes between two splitting ops."""

    nodes: list[fx.Node] = field(default_factory=list)


def split(
    graph_module: fx.GraphModule,
    splitting_ops: Sequence[str],
    symbols: Symbols,
    dims: Dims = SIZE_ALONE,
    bound: Mapping[str, torch.Tensor] | None = None,
) -> Split:
    """Split a Dynamo graph at the splitting ops.

    Integers that follow from the dynamic dimensions are no values that pieces exchange: each piece
    takes the dimensions themselves and computes them. `bound`: the inputs that the module holds, by
    name.

    Raises:
        UnknownSplittingOp: for a splitting op that is not registered.
        UnsupportedGraph: for what cannot be split, such as an autocast region around a
            splitting op.
    """
    names = splitting_names(splitting_ops)
    methods_as_operators(graph_module.graph, names)
    made_contiguous(graph_module.graph, names, symbols)
    return _Splitter(graph_module, names, symbols, dims).run(bound or {})


class _Splitter:
    def __init__(
        self, root: fx.GraphModule, names: frozenset[str], symbols: Symbols, dims: Dims
    ) -> None:
        self.root = root
        self.dims = dims
        self.names = names
        self.symbols = symbols
        self.sizes: dict[fx.Node, Size] = {}
        self.home: dict[fx.Node, _Segment | None] = {}
        """The segment of each node; None for graph inputs and splitting ops."""
        self.order: list[_Segment | fx.Node] = []
        self.pieces: dict[str, Piece] = {}
        self.objects: dict[fx.Node, fx.Node] = {}
        """Nodes that return an object that is there already: which node made it."""
        self.leaving: set[fx.Node] = set()
        """Nodes in segments whose values are needed outside their segment."""
        self.views: dict[fx.Node, fx.Node] = {}
        """Those of them that are views: of which other, or of which graph input."""
        self.written: list[fx.Node] = []
        """Values that are updated in place."""
        self.depth = 0
        """How many regions of a state (autocast, say) are open. An operator inside one is
        compiled with it: a region cannot be split."""

    def run(self, bound: Mapping[str, torch.Tensor]) -> Split:
        self.bound = bound
        for node in self.root.graph.nodes:
            self.place(node)
        self.find_leaving()
        self.find_views()
        steps: list[CallPiece | CallOp] = []
        for part in self.order:
            if isinstance(part, fx.Node):
                steps.append(self.call_op(part))
                continue
            if (call := self.call_piece(part)) is not None:
                steps.append(call)
            for node in part.nodes:
                if node in self.views:
                    steps += self.call_view(node)
        placeholders = self.root.graph.find_nodes(op="placeholder")
        inputs = tuple(n.name for n in placeholders)
        outputs = self.root.graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        updated = [n.name for n in updated_inputs(self.root.graph, self.written, self.is_given)]
        kinds = [(n.name, self.kind(n)) for n in placeholders if n.name not in self.bound]
        nbytes = {
            name: Size(kind.dtype.itemsize * extent(kind.shape, kind.strides)).code
            for name, kind in kinds
            if kind is not None
        }
        updates = updates_of(updated, nbytes, self.bound)
        results = tuple(map(self.refer, outputs))
        return Split(inputs, tuple(steps), results, self.pieces, updates, self.dims)

    # --- which node goes where ---------------------------------------------------------

    def place(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        value = node.meta.get("example_value")
        if (expr := expression_of(value)) is not None:
            self.note_size(node, expr)
            return
        if node.op == "placeholder":
            self.home[node] = None
            return
        if node.op == "call_module":
            raise UnsupportedGraph(f"the graph calls the module {node.target} as a black box")
        if node.op == "get_attr" or op_name(node.target) in GRAD_STATE:
            return  # copied to where it is used; dropped
        self.written += written(node)
        if (given := same_object(node)) is not None:
            self.objects[node] = self.same(given)
        self.depth += PAIRED_STATE.get(op_name(node.target), 0)
        splits = node.op == "call_function" and op_name(node.target) in self.names
        if (splits or ALONE in node.meta) and self.depth == 0:
            self.home[node] = None
            self.order.append(node)
            return
        if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node):
            if self.home.get(source) is None and _is_container(source):
                self.home[node] = None  # an element of what a splitting op returned
                self.order.append(node)
                return
            if _is_container(source) and (home := self.home[source]) is not None:
                home.nodes.append(node)  # tuples do not leave their piece, elements do
                self.home[node] = home
                return
        if not self.order or isinstance(self.order[-1], fx.Node):
            self.order.append(_Segment())
        segment = self.order[-1]
        assert isinstance(segment, _Segment)
        segment.nodes.append(node)
        self.home[node] = segment

    def note_size(self, node: fx.Node, expr: sympy.Basic) -> None:
        if not expr.free_symbols <= self.symbols.keys():
            raise OutsideGraph(
                f"{op_name(node.target)} gives an integer that is known only when the "
                f"model runs ({expr}), so what follows from it has no range: keep data-dependent "
                f"shapes (.item(), nonzero, masks as indices) out of the compiled function"
            )
        self.sizes[node] = Size(in_terms_of_size(expr, self.symbols))

    # --- views -------------------------------------------------------------------------

    def find_leaving(self) -> None:
        """Find the values of each segment that are needed outside it."""
        for node, home in self.home.items():
            outside = (user for user in node.users if user not in self.sizes)
            if home is not None and any(self.home.get(user) is not home for user in outside):
                self.leaving.add(self.same(node))

    def is_given(self, node: fx.Node) -> bool:
        """Whether a value is there without any piece: a graph input, or what an operator made."""
        return self.home.get(node) is None

    def same(self, node: fx.Node) -> fx.Node:
        """The node that made the object that a node returns."""
        return self.objects.get(node, node)

    def find_views(self) -> None:
        """Find the values that are to be made as views of others, outside the pieces."""
        families: dict[fx.Node, list[list[fx.Node]]] = {}
        for node in self.home:
            if node in self.leaving:
                chain = ancestry(node, self.is_given)
                families.setdefault(chain[-1], []).append(chain)
        for maker, chains in families.items():
            root = chains[0][0]  # the first that leaves, where the others are views of it
            if self.home.get(maker) is None or not all(root in chain for chain in chains):
                root = maker
            if self.home.get(root) is not None:
                self.leaving.add(root)
            for chain in chains:
                if chain[0] is not root:
                    self.views[chain[0]] = root

    def call_view(self, node: fx.Node) -> list[CallOp]:
        """The steps that make a view."""
        root = self.views[node]
        calls = calls_for(root.meta["example_value"], node.meta["example_value"], self.integer)
        steps = []
        source = self.refer(root)
        for index, (target, rest) in enumerate(calls):
            name = node.name if index == len(calls) - 1 else f"{node.name}_of_{index}"
            steps.append(CallOp(target, (source, *map(_as_sizes, rest)), {}, name))
            source = Name(name)
        return steps

    def integer(self, value: Any) -> sympy.Basic:
        """A size, stride or offset of a captured value in terms of the size."""
        expr = expression_of(value)
        assert expr is not None
        return in_terms_of_size(expr, self.symbols)

    # --- steps -------------------------------------------------------------------------

    def refer(self, value: Any) -> Any:
        """A node as the steps name it; containers are searched, constants stay."""
        if isinstance(value, fx.Node):
            if value in self.sizes:
                return self.sizes[value]
            if value.op == "get_attr":
                return attribute(self.root, str(value.target))
            return Name(self.same(value).name)
        if isinstance(value, (tuple, list)):
            made = [self.refer(v) for v in value]
            return made if isinstance(value, list) else tuple(made)
        if isinstance(value, dict):
            return {k: self.refer(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.refer(value.start), self.refer(value.stop), self.refer(value.step))
        return value

    def call_op(self, node: fx.Node) -> CallOp:
        kinds = {self.same(n).name: self.kind(n) for n in node.all_input_nodes}
        kinds[node.name] = self.kind(node)
        tensors = {name: kind for name, kind in kinds.items() if kind is not None}
        args, kwargs = self.refer(node.args), self.refer(node.kwargs)
        return CallOp(node.target, args, kwargs, node.name, tensors)

    def kind(self, node: fx.Node) -> TensorKind | None:
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None

        def described(dims: Sequence[Any]) -> tuple[Any, ...]:
            found = [expression_of(dim) for dim in dims]
            return tuple(in_terms_of_size(d, self.symbols) for d in found if d is not None)

        laid_out = described(value.shape), described(value.stride())
        return TensorKind(*laid_out, value.dtype, value.device.type, self.dims)

    def call_piece(self, segment: _Segment) -> CallPiece | None:
        outputs = [
            node for node in segment.nodes if node in self.leaving and node not in self.views
        ]
        if not outputs and not _has_effect(segment.nodes):
            return None
        for node in outputs:
            if not isinstance(node.meta.get("example_value"), torch.Tensor):
                raise UnsupportedGraph(
                    f"{node} is a {type(node.meta.get('example_value')).__name__} that is needed "
                    f"on both sides of a splitting op: only tensors can be"
                )
        piece, inputs = self.build(segment.nodes, outputs)
        self.pieces.setdefault(piece.fingerprint, piece)
        return CallPiece(
            piece.fingerprint, tuple(n.name for n in inputs), tuple(n.name for n in outputs)
        )

    # --- one piece ---------------------------------------------------------------------

    def build(
        self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> tuple[Piece, list[fx.Node]]:
        graph = fx.Graph()
        attributes: dict[str, Any] = {}
        copies: dict[fx.Node, Any] = {}
        inputs: list[fx.Node] = []
        members = set(nodes)
        used: list[fx.Node] = []  # in order of first use, so that equal pieces agree on it
        for node in nodes:
            outer = [n if n in members else self.same(n) for n in node.all_input_nodes]
            used += [n for n in outer if n not in members and n not in used]
        needed: set[sympy.Basic] = set()
        for node in used:
            if node in self.sizes:
                needed |= self.sizes[node].expr.free_symbols
            elif node.op != "get_attr":
                inputs.append(node)
                needed |= self.symbols_of(node.meta["example_value"])
        # Each input of a piece is compiled as memory of its own.
        updated = [each for node in nodes for each in written(node)]
        views = views_among(inputs, updated, self.integer, self.is_given, self.bound)
        inputs = [node for node in inputs if node not in views]
        given = {
            symbol: graph.placeholder(symbol.name)
            for symbol in self.dims.symbols
            if symbol in needed
        }

        def number(expr: sympy.Basic) -> Any:
            if not expr.free_symbols:
                return bool(expr) if expr.is_Boolean else int(expr)
            return as_nodes(expr, graph, given)

        for index, node in enumerate(inputs):
            copies[node] = graph.placeholder(f"arg{index}")
            self.describe(copies[node], node.meta["example_value"])
        for node, base in views.items():
            value = node.meta["example_value"]
            dims, strides, ahead = in_memory_of(base.meta["example_value"], value, self.integer)
            where = (tuple(map(number, dims)), tuple(map(number, strides)), number(ahead))
            copies[node] = graph.call_function(
                torch.ops.aten.as_strided.default, (copies[base], *where)
            )
            self.describe(copies[node], value)
        for node in used:
            if node in self.sizes:
                copies[node] = number(self.sizes[node].expr)
            elif node.op == "get_attr":
                name = f"const{len(attributes)}"
                attributes[name] = attribute(self.root, str(node.target))
                copies[node] = graph.get_attr(name)
        for node in nodes:
            for each in node.all_input_nodes:
                copies.setdefault(each, copies[self.same(each)])
            copy = _copy(graph, node, copies)
            # Captured values belong to the capture's ShapeEnv: no range may see them.
            self.describe(copy, copy.meta.pop("example_value", None))
            copies[node] = copy
        graph.output(tuple(copies[node] for node in outputs))
        graph_module = fx.GraphModule(attributes, graph)
        values = tuple(node.meta["example_value"] for node in inputs)
        name = fingerprint(graph_module, values, self.symbols)
        takes = tuple(symbol.name for symbol in given)
        return Piece(graph_module, values, takes, self.symbols, name, self.dims), inputs

    def symbols_of(self, value: torch.Tensor) -> set[sympy.Basic]:
        """The dynamic dimensions that a tensor's shape and strides follow from."""
        found = (in_terms_of_size(symbol, self.symbols) for symbol in symbols_in([value]))
        return {symbol for expr in found for symbol in expr.free_symbols}

    def describe(self, node: fx.Node, value: object) -> None:
        """Note what is known of a node's value that holds in every ShapeEnv."""
        if isinstance(value, torch.Tensor):
            dims = [expression_of(dim) for dim in value.shape]
            node.meta[SHAPE] = tuple(
                in_terms_of_size(d, self.symbols) for d in dims if d is not None
            )
            node.meta[DTYPE] = value.dtype


def _as_sizes(value: Any) -> Any:
    """An argument of an operator with its expressions as steps hold them."""
    if isinstance(value, tuple):
        return tuple(map(_as_sizes, value))
    if hasattr(value, "free_symbols"):
        return Size(value) if value.free_symbols else int(value)
    return value


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    args = fx.node.map_arg(node.args, lambda n: copies[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: copies[n])
    copy = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    copy.meta = dict(node.meta)
    return copy


def _has_effect(nodes: Sequence[fx.Node]) -> bool:
    return any(node.is_impure() or writes(node) for node in nodes)


def _is_container(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))
