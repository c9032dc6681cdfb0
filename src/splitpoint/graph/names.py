"""The operators that a graph is split at, by all names that it may have them under."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from ..errors import UnknownSplittingOp
from ..torch_internals.operators import op_name, operator_aliases


def splitting_names(names: Sequence[str]) -> frozenset[str]:
    """All names under which a graph may hold the operators named.

    Raises:
        UnknownSplittingOp: for one that is not registered.
    """
    found: set[str] = set()
    for name in names:
        try:
            found |= operator_aliases(name)
        except LookupError:
            raise UnknownSplittingOp(
                f"splitting_ops names {name!r}, which no operator is registered as: write it as "
                f"'namespace::name', and import the module that registers it first"
            ) from None
    return frozenset(found)


OF_SIZES = frozenset(
    {
        *("expand", "flip", "new_empty", "new_ones", "new_zeros", "permute", "repeat", "reshape"),
        *("resize_", "sum_to_size", "tile", "view"),
    }
)
"""Methods that take a list of numbers as so many arguments, too, which operators do not."""


def methods_as_operators(graph: fx.Graph, names: Collection[str]) -> None:
    """Make calls of the operators named, where the model wrote them as methods of a tensor
    (`cache.index_copy_(...)`), of calls of methods."""
    for node in graph.nodes:
        if node.op == "call_method" and f"aten::{node.target}" in names:
            rest = node.args[1:]
            if rest and node.target in OF_SIZES and all(map(_is_number, rest)):
                node.args = (node.args[0], [*rest])
            node.op, node.target = "call_function", getattr(torch.ops.aten, node.target)


def _is_number(given: object) -> bool:
    value = given.meta.get("example_value") if isinstance(given, fx.Node) else given
    return isinstance(value, (int, torch.SymInt))


def unmatched(graph: fx.Graph, names: Sequence[str]) -> list[str]:
    """Those of the operators named that a graph does not hold."""
    held = {op_name(node.target) for node in graph.nodes if node.op == "call_function"}
    held |= {f"aten::{node.target}" for node in graph.nodes if node.op == "call_method"}
    return [name for name in names if not held & splitting_names([name])]
