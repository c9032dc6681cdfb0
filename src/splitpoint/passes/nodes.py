"""What passes over collectives read of a graph's nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..torch_internals.operators import op_name
from ..torch_internals.sizes import statically_equal

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CASTS = frozenset({"prims::convert_element_type", "aten::_to_copy"})
VIEWS = frozenset(
    {"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::unsqueeze", "aten::squeeze.dim"}
)


def value(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta.get("val")


def name_of(node: fx.Node) -> str:
    """The operator a node calls, without a default overload."""
    return op_name(node.target) if node.op == "call_function" else ""


def argument(node: fx.Node, index: int, name: str) -> Any:
    """A positional or named argument of a node; None when it was left out."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def describe(node: fx.Node) -> str:
    """A node as a reader of a report knows it."""
    if node.op == "output":
        return "the end of the piece"
    return f"{name_of(node) or node.op} ({node.name})"


def is_transparent(node: fx.Node, hidden: int) -> bool:
    """Whether a node holds the same numbers, up to rounding and the shape before the last
    dimension, as what it takes."""
    name, own = name_of(node), value(node)
    if not isinstance(own, torch.Tensor) or own.dtype not in FLOATS:
        return False
    if name in CASTS:
        return True
    return (
        name in VIEWS
        and own.dim() > 0
        and statically_equal(own.shape[-1], hidden)
        # One unknown dimension can be written as -1 when results get their shape back.
        and sum(isinstance(size, torch.SymInt) for size in own.shape) <= 1
    )


def aliases(node: fx.Node, hidden: int) -> list[fx.Node]:
    """A node and what only casts or reshapes it, in the graph's order."""
    found = [node]
    for each in found:
        found += [u for u in each.users if is_transparent(u, hidden) and u not in found]
    return found


def uncast(node: fx.Node) -> fx.Node:
    """What a widening cast took: the same numbers in fewer bytes."""
    while name_of(node) in CASTS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own, given = value(node).dtype, value(source).dtype
        if given not in FLOATS or torch.promote_types(own, given) != own:
            return node
        node = source
    return node


def users_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The users of some nodes that are not among them, in order."""
    among = list(nodes)
    return list(dict.fromkeys(u for node in among for u in node.users if u not in among))


def operand(node: fx.Node, before: fx.Node) -> Any:
    """The other operand of a commutative operator."""
    a, b = node.args[:2]
    return b if a is before else a


def number(x: object) -> float | None:
    """A constant number as a float; None for anything else."""
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def last_dim_kept(node: fx.Node, before: fx.Node) -> bool | None:
    """True for a reduction of `before` over its last dimension alone, kept as 1; else None."""
    dims: Any = argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    rank = value(before).dim()
    return True if [d % rank for d in dims] == [rank - 1] and argument(node, 2, "keepdim") else None


def row_of(node: object, hidden: int) -> fx.Node | None:
    """The [hidden] tensor that an operand is, or is a view of."""
    while isinstance(node, fx.Node) and value(node).dim() != 1:
        node = node.args[0] if name_of(node) in (*VIEWS, "aten::expand") else None
    if isinstance(node, fx.Node) and statically_equal(value(node).shape[0], hidden):
        return node
    return None
