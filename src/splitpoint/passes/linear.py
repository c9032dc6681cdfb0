"""Give the linear layers of a piece the kernel and the weight layout that fit a range.

Unlike a `Pass`, which rewrites what Inductor already sees, this rewrites the captured piece
before it is compiled: a packed weight is another input, made once outside the graph, so that
pieces hold no weights and equal layers still share one graph.
"""

from __future__ import annotations

import copy
import hashlib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import fx

from .. import _torch, kernels
from ..graph.pieces import DTYPE, RANK, Piece
from ..kernels.layout import packed_shape
from ..ranges import Range


@dataclass(frozen=True)
class LinearShape:
    """What the choice of a kernel depends on: y[tokens, n] = x[tokens, k] @ weight^T (+ bias)."""

    n: int
    k: int
    dtype: torch.dtype
    bias: bool

    def __str__(self) -> str:
        return f"{self.k}->{self.n}"


@dataclass(frozen=True)
class Layout:
    """How a weight lies in memory for a kernel."""

    shape: Callable[[LinearShape], tuple[int, ...]]
    pack: Callable[[torch.Tensor], torch.Tensor]
    """From the [n, k] weight."""


@dataclass(frozen=True)
class Variant:
    """One way to run a linear layer. Adding one is adding an entry to `VARIANTS`."""

    name: str
    layout: str
    """Key of `LAYOUTS`; "plain" takes the module's own weight."""
    admits: Callable[[LinearShape, Range], bool]
    run: Callable[[torch.Tensor, torch.Tensor, LinearShape, torch.Tensor | None], torch.Tensor]
    """(x [tokens, k], weight in the layout, shape, bias) to y [tokens, n]."""
    call: Callable[[LinearShape], tuple[Any, tuple[Any, ...]]]
    """The operator of a graph, and its arguments after x and the weight and before the bias."""


def _few(shape: LinearShape, range_: Range) -> bool:
    return range_.end <= 16


def _any(shape: LinearShape, range_: Range) -> bool:
    return True


def _onednn(shape: LinearShape, range_: Range) -> bool:
    return range_.end >= 16 and _torch.onednn_linear_available(shape.dtype)


LAYOUTS: dict[str, Layout] = {
    "plain": Layout(lambda s: (s.n, s.k), lambda w: w),
    "packed": Layout(
        lambda s: packed_shape(s.n, s.k, s.dtype),
        lambda w: torch.ops.splitpoint.pack_weight(w),
    ),
    # Opaque: oneDNN blocks it as it likes, so nothing may look at its strides.
    "onednn": Layout(lambda s: (s.n, s.k), _torch.onednn_pack),
}

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "gemv",
            "plain",
            _few,
            lambda x, w, s, b: torch.ops.splitpoint.linear_gemv(x, w, None, b),
            lambda s: (torch.ops.splitpoint.linear_gemv.default, (None,)),
        ),
        Variant(
            "packed",
            "packed",
            _any,
            lambda x, w, s, b: torch.ops.splitpoint.linear_packed(x, w, s.n, None, b),
            lambda s: (torch.ops.splitpoint.linear_packed.default, (s.n, None)),
        ),
        Variant(
            "onednn",
            "onednn",
            _onednn,
            lambda x, w, s, b: _torch.onednn_linear(x, w, b),
            lambda s: (_torch.onednn_linear_op(), ()),
        ),
    )
}
"""Kernels of this package, by name. "inductor", which is not in it, leaves a layer as it is."""


def nbytes(shape: LinearShape, layout: str) -> int:
    """Bytes of a weight in a layout."""
    return math.prod(LAYOUTS[layout].shape(shape)) * shape.dtype.itemsize


# --- finding linear layers -------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A linear layer in a piece."""

    node: fx.Node
    x: fx.Node
    weight: int
    """Index of the weight among the piece's tensors."""
    bias: fx.Node | None
    shape: LinearShape


@cache
def _forms() -> dict[str, Callable[[fx.Node], tuple[Any, Any, Any]]]:
    """By operator: (x, weight, bias) of a node."""

    def linear(node: fx.Node) -> tuple[Any, Any, Any]:
        values = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        return values["input"], values["weight"], values.get("bias")

    return dict.fromkeys(_torch.operator_aliases("aten::linear"), linear)


def find(piece: Piece, bound: frozenset[int]) -> list[Site]:
    """The linear layers of a piece whose weight is among the tensors `bound` (by index) that
    the module holds, in the order in which they run."""
    placeholders = list(piece.graph_module.graph.find_nodes(op="placeholder"))
    tensors = placeholders[1:] if piece.takes_size else placeholders
    index_of = {node: index for index, node in enumerate(tensors)}
    sites = []
    for node in piece.graph_module.graph.nodes:
        form = _forms().get(_torch.op_name(node.target)) if node.op == "call_function" else None
        if form is None:
            continue
        x, weight, bias = form(node)
        index = index_of.get(weight)
        if index is None or index not in bound:
            continue
        value = piece.values[index]
        if (
            value.dim() == 2
            and all(isinstance(n, int) for n in value.shape)
            and value.device.type == "cpu"
            and value.dtype in (torch.float32, torch.bfloat16)
            and x.meta.get(DTYPE) == value.dtype
            and (bias is None or bias.meta.get(DTYPE) == value.dtype)
        ):
            n, k = value.shape
            shape = LinearShape(n, k, value.dtype, bias is not None)
            sites.append(Site(node, x, index, bias, shape))
    return sites


# --- rewriting -------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A piece ready to compile for one range."""

    piece: Piece
    sources: tuple[tuple[int, str], ...]
    """For each tensor input: which input of the original piece it is, in which layout."""

    @property
    def options(self) -> dict[str, Any]:
        """Inductor options that the piece needs."""
        if any(layout == "onednn" for _, layout in self.sources):
            return {"size_asserts": False, "alignment_asserts": False}
        return {}


def unchanged(piece: Piece) -> Prepared:
    """The piece as it is."""
    return Prepared(piece, tuple((index, "plain") for index in range(len(piece.values))))


def rewrite(piece: Piece, bound: frozenset[int], chosen: Mapping[LinearShape, str]) -> Prepared:
    """Replace the linear layers of a piece by the variants chosen for their shapes.

    Shapes that are not in `chosen`, or have "inductor" there, keep what they are.
    """
    sites = [s for s in find(piece, bound) if chosen.get(s.shape, "inductor") in VARIANTS]
    if not sites:
        return unchanged(piece)
    kernels.load()
    graph_module = copy.deepcopy(piece.graph_module)
    graph = graph_module.graph
    copies = dict(zip(piece.graph_module.graph.nodes, graph.nodes, strict=True))
    values: list[Any] = list(piece.values)
    sources = [(index, "plain") for index in range(len(values))]
    placeholders = graph.find_nodes(op="placeholder")
    tensors = list(placeholders[1:] if piece.takes_size else placeholders)
    for site in sites:
        variant = VARIANTS[chosen[site.shape]]
        source = (site.weight, variant.layout)
        if source not in sources:
            with graph.inserting_after(tensors[-1] if tensors else placeholders[-1]):
                tensors.append(graph.placeholder(f"arg{len(tensors)}"))
            sources.append(source)
            layout = LAYOUTS[variant.layout]
            values.append(piece.values[site.weight].new_empty(layout.shape(site.shape)))
        _replace(graph, copies, site, tensors[sources.index(source)], variant)
    # Weights that no layer reads in their own layout any more are not inputs any more.
    kept = []
    for index, node in enumerate(tensors):
        if node.users or (index < len(piece.values) and index not in {s.weight for s in sites}):
            kept.append(index)
        else:
            graph.erase_node(node)
    graph_module.recompile()
    names = ",".join(f"{site.weight}:{chosen[site.shape]}" for site in sites)
    fingerprint = hashlib.sha256(f"{piece.fingerprint} {names}".encode()).hexdigest()[:16]
    return Prepared(
        replace(
            piece,
            graph_module=graph_module,
            values=tuple(values[index] for index in kept),
            fingerprint=fingerprint,
        ),
        tuple(sources[index] for index in kept),
    )


def _replace(
    graph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    site: Site,
    weight: fx.Node,
    variant: Variant,
) -> None:
    node, x = copies[site.node], copies[site.x]
    rank = site.x.meta[RANK]
    target, arguments = variant.call(site.shape)
    bias = () if site.bias is None else (copies[site.bias],)
    with graph.inserting_before(node):
        rows = x
        if rank != 2:
            rows = graph.call_method("reshape", (x, -1, site.shape.k))
        y = graph.call_function(target, (rows, weight, *arguments, *bias))
        if rank != 2:
            shape = graph.call_function(getattr, (x, "shape"))
            dims = [graph.call_function(operator.getitem, (shape, d)) for d in range(rank - 1)]
            y = graph.call_method("view", (y, *dims, site.shape.n))
    y.meta |= {RANK: rank, DTYPE: site.shape.dtype}
    node.replace_all_uses_with(y)
    graph.erase_node(node)
