"""Split the norm's rows over the ranks: all-reduce + norm becomes reduce-scatter, norm of the
rank's own rows, all-gather.

As much is sent as by the all-reduce, and each rank norms its share of the rows only. What it
costs is a second start-up of a collective, so it is for large ranges. Between two layers of one
piece the residual stays split, and is gathered only where something needs all of it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..errors import InvalidField
from ..ranges import Range
from ..torch_internals import distributed
from ..torch_internals.graphs import add_call
from ..torch_internals.sizes import statically_divisible, statically_equal
from .base import Found
from .collective import Choice, CollectivePass, substitute
from .match import Match
from .nodes import CASTS, VIEWS, name_of, value


class SequenceParallel(CollectivePass):
    """All-reduce + RMSNorm as reduce-scatter, norm, all-gather, for ranges of large sizes.

    Rows are split evenly. Where the number of ranks divides every size of the range (a single
    size, most often) that is all; elsewhere rows of zeros are added, normed by the last ranks
    and dropped after the gather.

    Put it before `AllReduceRMSNorm`: what is split is not fused any more.

    Args:
        min_size: the smallest start of a range that this is for.
        pad: whether to pad sizes that the number of ranks does not divide. False leaves their
            ranges as they are, with a note.

    Raises:
        InvalidField: for a `min_size` below 1.
    """

    quantise = False

    def __init__(self, min_size: int, pad: bool = True) -> None:
        super().__init__(None)
        if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 1:
            raise InvalidField(f"min_size must be an integer of 1 or more, got {min_size!r}")
        self.min_size = min_size
        self.pad = pad

    def applies_to(self, range: Range) -> bool:
        """Whether a range starts at `min_size` or above."""
        return range.start >= self.min_size

    def settings(self) -> Mapping[str, Any]:
        """The constructor's arguments."""
        return {"min_size": self.min_size, "pad": self.pad}

    def uuid(self) -> str:
        """As of every collective pass, and the rank: the rows that it takes are in the graph."""
        return f"{super().uuid()} {distributed.ranks()}"

    def choose(self, found: Match) -> Choice:
        """Split all matches, or with `pad` off those whose rows divide."""
        world = distributed.group_of(found.group).size()
        if _divides(found, world):
            return Choice(f"sequence parallel over {world} ranks", "split")
        if self.pad:
            return Choice(f"sequence parallel over {world} ranks, padded", "pad")
        what = f"standard, {world} ranks do not divide every size (pad=False)"
        return Choice(what, None)

    def __call__(self, graph: fx.Graph) -> Found:
        """Rewrite the graph in place."""
        before = set(graph.nodes)
        found = super().__call__(graph)
        # Gathers of a residual whose every reader went on with its own rows.
        for node in reversed(list(graph.nodes)):
            if node not in before and not node.users:
                graph.erase_node(node)
        return found

    def replace(self, found: Match, algorithm: str) -> None:
        """Rewrite a match."""
        graph = found.reduce.graph
        with graph.inserting_before(found.reduce):
            rows = _Rows(graph, found, pad=algorithm == "pad")
            total = rows.add(rows.reduce_scatter(found.input), found.residual)
            norm = _rmsnorm(graph, total, found)
            if users := found.outside(found.norms):
                substitute(users, found, rows.all_gather(_cast(graph, norm, found.dtype)))
            if users := found.outside(found.sums):
                kept = found.input if found.residual is None else found.residual
                own = _cast(graph, total, value(kept).dtype)
                substitute(users, found, rows.all_gather(own))


def _divides(found: Match, world: int) -> bool:
    given = value(found.input)
    return statically_divisible(given.numel() // found.hidden, world)


_TRANSPARENT = frozenset({*CASTS, *VIEWS, "aten::constant_pad_nd", "_c10d_functional::wait_tensor"})
"""What lies between an all-gather and who reads all of its rows, in their order."""


class _Rows:
    """The rows of one match, split over the ranks of its group."""

    def __init__(self, graph: fx.Graph, found: Match, *, pad: bool) -> None:
        self.graph = graph
        self.hidden = found.hidden
        self.name = found.group
        group = distributed.group_of(found.group)
        self.world, self.rank = group.size(), group.rank()
        self.flat = self._flat(found.input)
        self.rows = self._size(self.flat)
        """Of all ranks, without padding."""
        self.share = self.rows
        if pad:
            self.share = self._arithmetic(operator.add, self.rows, self.world - 1)
        self.share = self._arithmetic(operator.floordiv, self.share, self.world)
        self.padding: tuple[Any, Any] | None = None
        """How many rows to add, and the same number negative to take them off again: the shape
        is then the number of rows itself, and no expression that only equals it."""
        if pad:
            padded = self._arithmetic(operator.mul, self.share, self.world)
            self.padding = (
                self._arithmetic(operator.sub, padded, self.rows),
                self._arithmetic(operator.sub, self.rows, padded),
            )

    def reduce_scatter(self, node: fx.Node) -> fx.Node:
        """This rank's rows of the sum over ranks."""
        ops = distributed.collective_ops()
        whole = self._padded(self._flat(node))
        part = self._call(ops.reduce_scatter_tensor.default, whole, "sum", self.world, self.name)
        return self._call(ops.wait_tensor.default, part)

    def all_gather(self, own: fx.Node) -> fx.Node:
        """All rows, [tokens, hidden], of which each rank has its own."""
        ops = distributed.collective_ops()
        whole = self._call(ops.all_gather_into_tensor.default, own, self.world, self.name)
        whole = self._call(ops.wait_tensor.default, whole)
        return whole if self.padding is None else self._pad(whole, self.padding[1])

    def add(self, own: fx.Node, residual: fx.Node | None) -> fx.Node:
        """The sum of own rows and those of a residual, in fp32."""
        total = _cast(self.graph, own, torch.float32)
        if residual is None:
            return total
        rest = self._own_rows(residual)
        return self._call(torch.ops.aten.add.Tensor, total, _cast(self.graph, rest, torch.float32))

    def _own_rows(self, node: fx.Node) -> fx.Node:
        if (gathered := self._gathered(node)) is not None:
            return gathered
        whole = self._padded(self._flat(node))
        shares = self._call(torch.ops.aten.reshape.default, whole, [self.world, -1, self.hidden])
        return self._call(torch.ops.aten.select.int, shares, 0, self.rank)

    def _gathered(self, node: fx.Node) -> fx.Node | None:
        """What this rank gave to the gather that a node comes from, if it comes from one."""
        while name_of(node) in _TRANSPARENT:
            source, *rest = node.args
            assert isinstance(source, fx.Node)
            if name_of(node) == "aten::constant_pad_nd" and list(rest[0])[:3] != [0, 0, 0]:  # type: ignore[arg-type]
                return None
            if value(source).shape[-1] != self.hidden:
                return None
            node = source
        if name_of(node) != "_c10d_functional::all_gather_into_tensor" or node.args[2] != self.name:
            return None
        own = node.args[0]
        assert isinstance(own, fx.Node)
        same = [value(own).shape[0], self.share]
        sizes = [size.meta["val"] if isinstance(size, fx.Node) else size for size in same]
        return own if statically_equal(*sizes) else None

    # --- nodes -------------------------------------------------------------------------

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return add_call(self.graph, target, *args)

    def _flat(self, node: fx.Node) -> fx.Node:
        if value(node).dim() == 2:
            return node
        return self._call(torch.ops.aten.reshape.default, node, [-1, self.hidden])

    def _padded(self, node: fx.Node) -> fx.Node:
        return node if self.padding is None else self._pad(node, self.padding[0])

    def _pad(self, node: fx.Node, rows: Any) -> fx.Node:
        return self._call(torch.ops.aten.constant_pad_nd.default, node, [0, 0, 0, rows], 0.0)

    def _size(self, node: fx.Node) -> Any:
        size = value(node).shape[0]
        return size if isinstance(size, int) else self._call(torch.ops.aten.sym_size.int, node, 0)

    def _arithmetic(self, function: Any, a: Any, b: int | fx.Node) -> Any:
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return self._call(function, a, b)
        return function(a, b)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if value(node).dtype == dtype:
        return node
    return add_call(graph, torch.ops.prims.convert_element_type.default, node, dtype)


def _rmsnorm(graph: fx.Graph, total: fx.Node, found: Match) -> fx.Node:
    """The norm of fp32 rows, in fp32."""
    aten = torch.ops.aten
    square = add_call(graph, aten.mul.Tensor, total, total)
    mean = add_call(graph, aten.mean.dim, square, [-1], True)
    root = add_call(graph, aten.rsqrt.default, add_call(graph, aten.add.Scalar, mean, found.eps))
    norm = add_call(graph, aten.mul.Tensor, total, root)
    if found.weight is None:
        return norm
    weight = _cast(graph, found.weight, torch.float32)
    if found.weight_bias:
        weight = add_call(graph, aten.add.Scalar, weight, found.weight_bias)
    return add_call(graph, aten.mul.Tensor, norm, weight)
