"""Split a captured graph at its splitting ops, and find the pieces that are equal."""

from __future__ import annotations

import ctypes
import hashlib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import _torch
from ..errors import UnknownSplittingOp, UnsupportedGraph

if TYPE_CHECKING:
    import sympy

SHAPE, DTYPE = "splitpoint_shape", "splitpoint_dtype"
"""Keys of a piece's `node.meta`: what is known of a tensor without a ShapeEnv. A dimension is an
expression over `_torch.size_symbol()`."""


@dataclass(frozen=True)
class Size:
    """An integer that follows from the size."""

    expr: sympy.Basic

    @property
    def code(self) -> str:
        """Python over `size`."""
        return _torch.python_code(self.expr)


@dataclass(frozen=True)
class TensorKind:
    """What is known of a tensor without a ShapeEnv."""

    shape: tuple[Any, ...]
    """Expressions over `_torch.size_symbol()`, as the strides."""
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: str

    def shape_at(self, size: int) -> tuple[int, ...]:
        """The shape at a size."""
        return _at(self.shape, size)

    def strides_at(self, size: int) -> tuple[int, ...]:
        """The strides at a size."""
        return _at(self.strides, size)


def _at(expressions: Sequence[sympy.Basic], size: int) -> tuple[int, ...]:
    return tuple(int(eval(Size(e).code, {"size": size, "math": math})) for e in expressions)


@dataclass(frozen=True)
class Piece:
    """A subgraph without splitting ops: what is compiled, once per range."""

    graph_module: fx.GraphModule
    """Takes the size if `takes_size`, then the tensors; returns a tuple of tensors."""
    values: tuple[Any, ...]
    """The captured (fake) value of each input tensor."""
    takes_size: bool
    symbols: _torch.Symbols
    """What the symbols in `values` mean."""
    fingerprint: str
    """Equal for pieces that compute the same from the same kinds of inputs."""


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

    @property
    def piece_count(self) -> int:
        """How many pieces the graph has, equal ones counted each."""
        return sum(isinstance(step, CallPiece) for step in self.steps)


@dataclass
class _Segment:
    """Consecutive nodes between two splitting ops."""

    nodes: list[fx.Node] = field(default_factory=list)


def splitting_names(names: Sequence[str]) -> frozenset[str]:
    """All names under which a graph may hold the operators named.

    Raises:
        UnknownSplittingOp: for one that is not registered.
    """
    found: set[str] = set()
    for name in names:
        try:
            found |= _torch.operator_aliases(name)
        except LookupError:
            raise UnknownSplittingOp(
                f"splitting_ops names {name!r}, which no operator is registered as: write it as "
                f"'namespace::name', and import the module that registers it first"
            ) from None
    return frozenset(found)


def split(
    graph_module: fx.GraphModule, splitting_ops: Sequence[str], symbols: _torch.Symbols
) -> Split:
    """Split a Dynamo graph at the splitting ops.

    Integers that follow from the size are no values that pieces exchange: each piece takes
    the size itself and computes them.

    Raises:
        UnknownSplittingOp: for a splitting op that is not registered.
        UnsupportedGraph: for what cannot be split, such as an autocast region around a
            splitting op.
    """
    return _Splitter(graph_module, splitting_names(splitting_ops), symbols).run()


class _Splitter:
    def __init__(
        self, root: fx.GraphModule, names: frozenset[str], symbols: _torch.Symbols
    ) -> None:
        self.root = root
        self.names = names
        self.symbols = symbols
        self.sizes: dict[fx.Node, Size] = {}
        self.home: dict[fx.Node, _Segment | None] = {}
        """The segment of each node; None for graph inputs and splitting ops."""
        self.order: list[_Segment | fx.Node] = []
        self.pieces: dict[str, Piece] = {}
        self.depth = 0
        """How many regions of a state (autocast, say) are open. An operator inside one is
        compiled with it: a region cannot be split."""

    def run(self) -> Split:
        for node in self.root.graph.nodes:
            self.place(node)
        steps: list[CallPiece | CallOp] = []
        for part in self.order:
            if isinstance(part, fx.Node):
                steps.append(self.call_op(part))
            elif (call := self.call_piece(part)) is not None:
                steps.append(call)
        inputs = tuple(n.name for n in self.root.graph.find_nodes(op="placeholder"))
        outputs = self.root.graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        return Split(inputs, tuple(steps), tuple(map(self.refer, outputs)), self.pieces)

    # --- which node goes where ---------------------------------------------------------

    def place(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        value = node.meta.get("example_value")
        if (expr := _torch.expression(value)) is not None:
            self.note_size(node, expr)
            return
        if node.op == "placeholder":
            self.home[node] = None
            return
        if node.op == "call_module":
            raise UnsupportedGraph(f"the graph calls the module {node.target} as a black box")
        if node.op == "get_attr" or _torch.op_name(node.target) in _torch.GRAD_STATE:
            return  # copied to where it is used; dropped
        self.depth += _torch.PAIRED_STATE.get(_torch.op_name(node.target), 0)
        splits = node.op == "call_function" and _torch.op_name(node.target) in self.names
        if splits and self.depth == 0:
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
            raise UnsupportedGraph(
                f"{_torch.op_name(node.target)} gives an integer that is known only when the "
                f"model runs ({expr}), so what follows from it has no range: keep data-dependent "
                f"shapes (.item(), nonzero, masks as indices) out of the compiled function"
            )
        self.sizes[node] = Size(_torch.in_terms_of_size(expr, self.symbols))

    # --- steps -------------------------------------------------------------------------

    def refer(self, value: Any) -> Any:
        """A node as the steps name it; containers are searched, constants stay."""
        if isinstance(value, fx.Node):
            if value in self.sizes:
                return self.sizes[value]
            if value.op == "get_attr":
                return _attribute(self.root, str(value.target))
            return Name(value.name)
        if isinstance(value, (tuple, list)):
            made = [self.refer(v) for v in value]
            return made if isinstance(value, list) else tuple(made)
        if isinstance(value, dict):
            return {k: self.refer(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.refer(value.start), self.refer(value.stop), self.refer(value.step))
        return value

    def call_op(self, node: fx.Node) -> CallOp:
        kinds = {each.name: self.kind(each) for each in (node, *node.all_input_nodes)}
        tensors = {name: kind for name, kind in kinds.items() if kind is not None}
        args, kwargs = self.refer(node.args), self.refer(node.kwargs)
        return CallOp(node.target, args, kwargs, node.name, tensors)

    def kind(self, node: fx.Node) -> TensorKind | None:
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None

        def described(dims: Sequence[Any]) -> tuple[Any, ...]:
            found = [_torch.expression(dim) for dim in dims]
            return tuple(_torch.in_terms_of_size(d, self.symbols) for d in found if d is not None)

        return TensorKind(
            described(value.shape), described(value.stride()), value.dtype, value.device.type
        )

    def call_piece(self, segment: _Segment) -> CallPiece | None:
        members = set(segment.nodes)
        outputs = [
            node
            for node in segment.nodes
            if any(user not in members and user not in self.sizes for user in node.users)
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
            used += [n for n in node.all_input_nodes if n not in members and n not in used]
        symbolic = False
        for node in used:
            if node in self.sizes:
                symbolic |= bool(self.sizes[node].expr.free_symbols)
            elif node.op != "get_attr":
                inputs.append(node)
                symbolic |= _is_symbolic(node.meta["example_value"])
        size = graph.placeholder("size") if symbolic else None
        for index, node in enumerate(inputs):
            copies[node] = graph.placeholder(f"arg{index}")
            self.describe(copies[node], node.meta["example_value"])
        for node in used:
            if node in self.sizes:
                expr = self.sizes[node].expr
                if expr.free_symbols:
                    assert size is not None
                    copies[node] = _torch.as_nodes(expr, size)
                else:
                    copies[node] = bool(expr) if expr.is_Boolean else int(expr)
            elif node.op == "get_attr":
                name = f"const{len(attributes)}"
                attributes[name] = _attribute(self.root, str(node.target))
                copies[node] = graph.get_attr(name)
        for node in nodes:
            copy = _copy(graph, node, copies)
            # Captured values belong to the capture's ShapeEnv: no range may see them.
            self.describe(copy, copy.meta.pop("example_value", None))
            copies[node] = copy
        graph.output(tuple(copies[node] for node in outputs))
        graph_module = fx.GraphModule(attributes, graph)
        values = tuple(node.meta["example_value"] for node in inputs)
        if _torch.share_memory(values) and any(map(writes, nodes)):
            # Each input of a piece is compiled as memory of its own.
            raise UnsupportedGraph(
                "between two splitting ops a tensor is updated in place of which the same code "
                "takes another view: update it out of place, or pass splitting_ops=()"
            )
        fingerprint = _fingerprint(graph_module, values, self.symbols)
        return Piece(graph_module, values, symbolic, self.symbols, fingerprint), inputs

    def describe(self, node: fx.Node, value: object) -> None:
        """Note what is known of a node's value that holds in every ShapeEnv."""
        if isinstance(value, torch.Tensor):
            dims = [_torch.expression(dim) for dim in value.shape]
            node.meta[SHAPE] = tuple(
                _torch.in_terms_of_size(d, self.symbols) for d in dims if d is not None
            )
            node.meta[DTYPE] = value.dtype


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    args = fx.node.map_arg(node.args, lambda n: copies[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: copies[n])
    copy = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    copy.meta = dict(node.meta)
    return copy


def _has_effect(nodes: Sequence[fx.Node]) -> bool:
    return any(node.is_impure() or writes(node) for node in nodes)


def writes(node: fx.Node) -> bool:
    """Whether a Dynamo node may change one of its arguments."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.target is operator.setitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if node.target in _IN_PLACE or "out" in node.kwargs:
        return True
    # `operator` writes its in-place functions iand, and has and_, not_, is_ for Python's keywords.
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and getattr(operator, name, None) is not node.target


_IN_PLACE = {
    getattr(operator, name)
    for name in (
        *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior"),
        *("ipow", "irshift", "isub", "itruediv", "ixor"),
    )
}


def _is_container(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))


def _is_symbolic(value: torch.Tensor) -> bool:
    return any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride()))


def _attribute(root: fx.GraphModule, path: str) -> Any:
    return operator.attrgetter(path)(root)


# --- fingerprints ----------------------------------------------------------------------


def describe(piece: Piece) -> str:
    """What a piece computes, as text that is equal in every process.

    Raises:
        NotPortable: when that depends on objects or code of this process.
    """
    rows = [_describe_value(value, piece.symbols) for value in piece.values]
    rows += [*_portable_targets(piece.graph_module), *_describe_graph(piece.graph_module)]
    for row in rows:
        if " at 0x" in row or row.startswith("attribute object "):
            raise NotPortable(row)
    return "\n".join(rows)


class NotPortable(Exception):
    """A graph means something in this process only; says what."""


def _portable_targets(graph_module: fx.GraphModule) -> Iterator[str]:
    """A line for each operator in a graph that is not torch's own.

    Raises:
        NotPortable: for a call of anything else.
    """
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            inner = _attribute(graph_module, node.target)
            if isinstance(inner, fx.GraphModule):
                yield from _portable_targets(inner)
        elif node.op == "call_function":
            schema = _torch.operator_schema(node.target)
            if schema is not None:
                yield schema
            elif not _torch.is_builtin_target(node.target):
                raise NotPortable(f"a call of {_torch.op_name(node.target)}")


def _fingerprint(
    graph_module: fx.GraphModule, values: Sequence[Any], symbols: _torch.Symbols
) -> str:
    """A hash of what a piece computes: operators, topology, constants and kinds of inputs.

    Names, stack traces and module paths are left out.
    """
    rows = [_describe_value(value, symbols) for value in values]
    rows += _describe_graph(graph_module)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def _describe_value(value: torch.Tensor, symbols: _torch.Symbols) -> str:
    def dim(n: object) -> str:
        expr = _torch.expression(n)
        assert expr is not None
        return str(_torch.in_terms_of_size(expr, symbols))

    shape = ",".join(map(dim, value.shape))
    strides = ",".join(map(dim, value.stride()))
    return f"input {value.dtype} {value.device} [{shape}] [{strides}]"


def _describe_graph(graph_module: fx.GraphModule) -> list[str]:
    number = {node: index for index, node in enumerate(graph_module.graph.nodes)}

    def describe(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, (tuple, list)):
            return f"{type(value).__name__}({','.join(map(describe, value))})"
        if isinstance(value, dict):
            return "{" + ",".join(f"{k!r}:{describe(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({describe(value.start)},{describe(value.stop)},{describe(value.step)})"
        return f"{type(value).__name__}:{value!r}"

    rows = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            rows.append(f"attribute {_describe_attribute(_attribute(graph_module, node.target))}")
        else:
            target = "" if node.op in ("placeholder", "output") else _describe_target(node.target)
            rows.append(f"{node.op} {target} {describe(node.args)} {describe(node.kwargs)}")
    return rows


def _describe_target(target: Any) -> str:
    name = _torch.op_name(target)
    if callable(target) and "<" in name:  # a lambda or a local function: its name is not its own
        return f"{name}@{id(target)}"
    return name


def _describe_attribute(value: object) -> str:
    if isinstance(value, fx.GraphModule):
        return "(" + ";".join(_describe_graph(value)) + ")"
    if isinstance(value, torch.Tensor):
        held = value.detach().cpu().contiguous()
        data = ctypes.string_at(held.data_ptr(), held.nbytes) if held.nbytes else b""
        digest = hashlib.sha256(data).hexdigest()
        return f"tensor {value.dtype} {value.device} {list(value.shape)} {digest}"
    return f"object {id(value)}"
