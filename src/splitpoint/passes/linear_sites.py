"""Find the linear layers of a piece, with what comes right before and after them.

Layers of the same input become one site, as do a gate and what it gates; an activation, a gate and
a residual that nothing else needs the operand of belong to the layer they follow. What a site
computes is all in its `LinearShape`, which is what a kernel is chosen for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..graph.pieces import DTYPE, SHAPE, Piece, Size
from ..graph.updates import writes
from ..kernels.devices import device_row
from ..kernels.int4 import int4_format
from ..ranges import Range
from ..torch_internals.operators import op_name, operator_aliases


@dataclass(frozen=True)
class LinearShape:
    """What the choice of a kernel depends on.

    For each of `columns`, y[tokens, n] = activation(x[tokens, k] @ weight^T (+ bias)); if gated,
    one y = activation(first) * second. A residual may be added to a single y.
    """

    columns: tuple[int, ...]
    k: int
    dtype: torch.dtype
    """Of x and y, and of the weights unless they are int8."""
    bias: bool = False
    activation: str = "none"
    gated: bool = False
    residual: bool = False
    transposed: bool = False
    """Whether the weights lie as [k, n]."""
    int8: bool = False
    """Whether the weights are int8, with one factor for each column."""
    packed: str = ""
    """The layout in which the module itself holds its weights, if it is a packed one: "int8",
    "int4_64" and the like."""
    rows: str = "size"
    """How many rows x has, as Python over `size`: an output layer may take one row of many."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """Columns of each result."""
        return self.columns[:1] if self.gated else self.columns

    @property
    def of_any_rows(self) -> LinearShape:
        """The same layers whatever x has of rows."""
        return replace(self, rows="size")

    def rows_in(self, range_: Range) -> Range:
        """The rows that x has at the ends of a range of sizes."""
        ends = [int(eval(self.rows, {"size": n, "math": math})) for n in (range_.start, range_.end)]
        return Range(max(1, min(ends)), max(1, *ends))

    @property
    def is_quantised(self) -> bool:
        """Whether the weights have fewer bits than the dtype."""
        return self.int8 or bool(self.packed)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.int8 if self.int8 else self.dtype

    def __str__(self) -> str:
        first = str(self.columns[0])
        if self.activation != "none":
            first = f"{self.activation}({first})"
        joint = "*" if self.gated else "+"
        text = f"{self.k}->{joint.join([first, *map(str, self.columns[1:])])}"
        text += " +residual" if self.residual else ""
        return text if self.rows == "size" else f"{text} of {self.rows} rows"


@dataclass(frozen=True)
class Site:
    """Linear layers in a piece that one kernel call can serve."""

    x: fx.Node
    weights: tuple[int, ...]
    """Indices among the piece's tensors."""
    scales: tuple[int, ...]
    """Of int8 weights: indices among the piece's tensors."""
    biases: tuple[fx.Node, ...]
    residual: fx.Node | None
    outputs: tuple[fx.Node, ...]
    """The nodes whose values the site makes, in the order of `shape.outputs`."""
    shape: LinearShape

    @property
    def place(self) -> fx.Node:
        """The node before which all that the site reads is there."""
        return self.outputs[0]


def find(piece: Piece, bound: frozenset[int]) -> list[Site]:
    """The linear layers of a piece whose weights are among the tensors `bound` (by index) that
    the module holds, in the order in which they run."""
    finder = _Finder(piece, bound)
    sites = [site for node in piece.graph_module.graph.nodes if (site := finder.layer(node))]
    if any(map(writes, piece.graph_module.graph.nodes)):
        return sites  # a layer that moves could read what was written later
    by_output = {site.outputs[0]: site for site in sites}
    for fuse in (_activate, _gate, _add_residual):
        for node in piece.graph_module.graph.nodes:
            if (site := fuse(node, by_output)) is not None:
                by_output[node] = site
    order = {node: index for index, node in enumerate(piece.graph_module.graph.nodes)}
    fused = sorted(by_output.values(), key=lambda site: order[site.place])
    return list(_merged(fused))


# --- one layer -------------------------------------------------------------------------

_Form = Callable[[fx.Node], tuple[Any, Any, Any, bool] | None]


@cache
def _forms() -> dict[str, _Form]:
    """By operator: (x, weight, bias, whether the weight is [k, n]) of a node."""

    def arguments(node: fx.Node, *names: str) -> dict[str, Any]:
        return dict(zip(names, node.args, strict=False)) | node.kwargs

    def linear(node: fx.Node) -> tuple[Any, Any, Any, bool]:
        found = arguments(node, "input", "weight", "bias")
        return found["input"], found["weight"], found.get("bias"), False

    def product(node: fx.Node) -> tuple[Any, Any, Any, bool]:
        return node.args[0], node.args[1], None, True

    def addmm(node: fx.Node) -> tuple[Any, Any, Any, bool] | None:
        found = arguments(node, "input", "mat1", "mat2")
        if found.get("beta", 1) != 1 or found.get("alpha", 1) != 1:
            return None
        return found["mat1"], found["mat2"], found["input"], True

    forms: dict[str, _Form] = {}
    for name, form in (
        ("linear", linear),
        ("mm", product),
        ("matmul", product),
        ("addmm", addmm),
    ):
        forms |= dict.fromkeys({name, *operator_aliases(f"aten::{name}")}, form)
    forms[op_name(operator.matmul)] = product
    return forms


class _Finder:
    def __init__(self, piece: Piece, bound: frozenset[int]) -> None:
        placeholders = list(piece.graph_module.graph.find_nodes(op="placeholder"))
        tensors = placeholders[len(piece.takes) :]
        self.dims = piece.dims
        self.values = piece.values
        self.held = {node: index for index, node in enumerate(tensors) if index in bound}

    def layer(self, node: fx.Node) -> Site | None:
        """The linear layer that a node is, if it is one."""
        if node.target is operator.getitem:
            return self._packed(node)
        form = _forms().get(_called(node))
        found = form(node) if form is not None else None
        if found is None:
            return None
        x, weight, bias, transposed = found
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
            return None
        weight, turned = _through_transpose(weight)
        inner = _through_cast(weight)
        index = self.held.get(inner)
        if index is None:
            return None
        value = self.values[index]
        dtype, int8 = node.meta.get(DTYPE), value.dtype == torch.int8
        if (
            value.dim() != 2
            or not all(isinstance(n, int) for n in value.shape)
            or not device_row(value.device).own_kernels
            or dtype not in (torch.float32, torch.bfloat16)
            or x.meta.get(DTYPE) != dtype
            or not (value.dtype == dtype if inner is weight else int8)
            or len(x.meta[SHAPE]) < (2 if transposed else 1)
        ):
            return None
        transposed ^= turned
        k, n = value.shape if transposed else reversed(value.shape)
        if bias is not None and not (
            bias in self.held and bias.meta[DTYPE] == dtype and bias.meta[SHAPE] == (n,)
        ):
            return None
        count = math.prod(x.meta[SHAPE][:-1])  # of expressions, or of no dimension
        rows = Size(self.dims.in_size(count)).code
        shape = LinearShape(
            (n,), k, dtype, bias is not None, transposed=transposed, int8=int8, rows=rows
        )
        biases = () if bias is None else (bias,)
        if not int8:
            return Site(x, (index,), (), biases, None, (node,), shape)
        scaled = _only_user(node)
        operands = _operands(scaled, _names("mul")) if scaled is not None else []
        others = [operand for operand in operands if operand is not node]
        if bias is not None or scaled is None or len(others) != 1 or others[0] not in self.held:
            return None
        (scale,) = others
        if scale.meta[SHAPE] != (n,) or not scaled.meta[DTYPE] == scale.meta[DTYPE] == dtype:
            return None
        return Site(x, (index,), (self.held[scale],), (), None, (scaled,), shape)

    def _packed(self, node: fx.Node) -> Site | None:
        """The layer whose result a node takes from a call of the kernel over a packed weight."""
        made = node.args[0]
        if not isinstance(made, fx.Node) or _called(made) != "splitpoint::linear_packed":
            return None
        given: dict[str, Any] = dict(zip(_PACKED_ARGUMENTS, made.args, strict=False))
        given |= made.kwargs
        extras = given.get("residual"), given.get("activation", "none"), given.get("gated", False)
        if extras != (None, "none", False) or len(given["weights"]) != 1 or node.args[1] != 0:
            return None
        x, (weight,), (n,) = given["x"], given["weights"], given["n"]
        scales, biases = tuple(given["scales"]), tuple(given["biases"])
        if not all(each in self.held for each in (weight, *scales, *biases)):
            return None
        value, (*rows, k) = self.values[self.held[weight]], x.meta[SHAPE]
        if value.dtype not in (torch.int8, torch.uint8):
            return None
        layout = "int8" if value.dtype == torch.int8 else str(int4_format(value.shape))
        count = math.prod(rows)
        shape = LinearShape(
            (n,),
            int(k),
            node.meta[DTYPE],
            bool(biases),
            int8=bool(scales),
            packed=layout,
            rows=Size(self.dims.in_size(count)).code,
        )
        indices = tuple(self.held[scale] for scale in scales)
        return Site(x, (self.held[weight],), indices, biases, None, (node,), shape)


_PACKED_ARGUMENTS = ("x", "weights", "n", "scales", "biases", "residual", "activation", "gated")
"""Of `splitpoint::linear_packed`."""


def _through_transpose(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a matrix is the transpose of, and whether it is one."""
    name, args = _called(node), node.args
    if name in ("t", "aten::t", "aten::numpy_T") or (name == "getattr" and args[1] in ("T", "mT")):
        return args[0], True  # type: ignore[return-value]
    if name in ("transpose", "aten::transpose") and {*args[1:]} in ({0, 1}, {-1, -2}):
        return args[0], True  # type: ignore[return-value]
    return node, False


def _through_cast(node: fx.Node) -> fx.Node:
    """What a matrix is a copy of in another dtype."""
    if _called(node) in ("to", "type", "type_as", "float", "bfloat16") and len(node.args) <= 2:
        return node.args[0]  # type: ignore[return-value]
    return node


def _called(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.target is getattr:
        return "getattr"
    return op_name(node.target) if node.op == "call_function" else ""


# --- what comes after ------------------------------------------------------------------


@cache
def _activations() -> dict[str, str]:
    """By operator: an activation that takes its name or its `approximate` argument from it."""
    found = dict.fromkeys(operator_aliases("aten::silu"), "silu")
    found |= dict.fromkeys(operator_aliases("aten::gelu"), "gelu")
    found[op_name(F.silu)] = "silu"
    return found


def _activate(node: fx.Node, sites: dict[fx.Node, Site]) -> Site | None:
    """The site of a layer, with the activation that `node` is of it."""
    activation = _activations().get(_called(node))
    if activation is None or not node.args or not isinstance(before := node.args[0], fx.Node):
        return None
    site = sites.get(before)
    if site is None or _only_user(before) is not node:
        return None
    if activation == "gelu":
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        activation = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
        if activation is None:
            return None
    del sites[before]
    return replace(site, outputs=(node,), shape=replace(site.shape, activation=activation))


def _gate(node: fx.Node, sites: dict[fx.Node, Site]) -> Site | None:
    """The sites of a gate and of what it gates, whose product `node` is, as one."""
    found = [sites.get(operand) for operand in _operands(node, _names("mul"))]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    first, second = found[0], found[1]
    if first.shape.activation == "none":
        first, second = second, first
    plain = replace(first.shape, activation="none")
    if first is second or first.x is not second.x or plain != second.shape:
        return None
    pair = [first, second]
    if any(_only_user(site.outputs[0]) is not node for site in pair):
        return None
    for site in pair:
        del sites[site.outputs[0]]
    shape = replace(first.shape, columns=first.shape.columns * 2, gated=True)
    return _joined(pair, (node,), shape)


def _add_residual(node: fx.Node, sites: dict[fx.Node, Site]) -> Site | None:
    """The site of a layer, with the residual that `node` adds to it."""
    operands = _operands(node, _names("add"))
    for operand, residual in zip(operands, operands[::-1], strict=True):
        site = sites.get(operand)
        if (
            site is not None
            and residual is not operand
            and _only_user(operand) is node
            and residual.meta.get(SHAPE) == operand.meta[SHAPE] == node.meta.get(SHAPE)
            and residual.meta[DTYPE] == node.meta[DTYPE] == site.shape.dtype
        ):
            del sites[operand]
            shape = replace(site.shape, residual=True)
            return replace(site, residual=residual, outputs=(node,), shape=shape)
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _operands(node: fx.Node, names: frozenset[str]) -> list[fx.Node]:
    """The two operands of a binary operator with one of these names; else nothing."""
    if _called(node) not in names or node.kwargs or len(node.args) != 2:
        return []
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    return operands if len(operands) == 2 else []


@cache
def _names(operation: str) -> frozenset[str]:
    function = getattr(operator, operation)
    names = {operation, *operator_aliases(f"aten::{operation}"), op_name(function)}
    return frozenset(names)


# --- layers of one input ---------------------------------------------------------------


def _merged(sites: Sequence[Site]) -> Iterator[Site]:
    """Sites with nothing but a product, of the same input and alike, as one each."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        alone = site.shape.gated or site.shape.residual or site.shape.activation != "none"
        key = site if alone else (site.x, replace(site.shape, columns=()))
        groups.setdefault(key, []).append(site)
    for group in groups.values():
        if len(group) == 1:
            yield group[0]
            continue
        columns = tuple(site.shape.columns[0] for site in group)
        outputs = tuple(site.outputs[0] for site in group)
        yield _joined(group, outputs, replace(group[0].shape, columns=columns))


def _joined(sites: Sequence[Site], outputs: tuple[fx.Node, ...], shape: LinearShape) -> Site:
    return Site(
        sites[0].x,
        tuple(index for site in sites for index in site.weights),
        tuple(index for site in sites for index in site.scales),
        tuple(bias for site in sites for bias in site.biases),
        None,
        outputs,
        shape,
    )
