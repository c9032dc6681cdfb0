"""Which nodes of a graph update memory in place."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from .views import ancestry, memory_in, same_object


def writes(node: fx.Node) -> bool:
    """Whether a Dynamo node may change one of its arguments."""
    if node.op == "call_method":
        name = str(node.target)
        if name.endswith("_") and not name.endswith("__"):
            return True
        return name not in _RETURN_SELF and same_object(node) is not None
    if node.target is operator.setitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if node.target in _IN_PLACE or "out" in node.kwargs or _asked_in_place(node):
        return True
    # `operator` writes its in-place functions iand, and has and_, not_, is_ for Python's keywords.
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and getattr(operator, name, None) is not node.target


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node may change."""
    if not writes(node):
        return []
    schema = getattr(node.target, "_schema", None)
    found: list[Any] = []
    if schema is not None:
        for index, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[index] if index < len(node.args) else None
                found.append(node.kwargs.get(argument.name, given))
    elif "out" in node.kwargs:
        found.append(node.kwargs["out"])
    else:
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    nodes: list[fx.Node] = []
    for each in found:
        fx.node.map_arg(each, nodes.append)
    return nodes


def updated_inputs(
    graph: fx.Graph, updated: Iterable[fx.Node], is_given: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """The inputs of a graph in whose memory the values lie that it updates."""
    roots = {ancestry(node, is_given)[-1] for node in updated}
    # What an operator returned may be an argument of it, and then has that one's memory.
    made = {memory_in(root) for root in roots if root.op != "placeholder"} - {None}
    inputs = graph.find_nodes(op="placeholder")
    return [node for node in inputs if node in roots or memory_in(node) in made]


def _asked_in_place(node: fx.Node) -> bool:
    """Whether a function such as `relu(x, inplace=True)` was."""
    if getattr(node.target, "__module__", "") != torch.nn.functional.__name__:
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False  # no function of Python's
    return given.arguments.get("inplace") is True


_RETURN_SELF = {
    *("contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cfloat"),
    *("int", "long", "short", "char", "byte", "bool", "cpu", "cuda", "expand", "expand_as"),
    *("resolve_conj", "resolve_neg", "sum_to_size", "coalesce", "positive", "__pos__"),
}
"""Methods that may return the tensor itself and change nothing."""


_IN_PLACE = {
    getattr(operator, name)
    for name in (
        *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior"),
        *("ipow", "irshift", "isub", "itruediv", "ixor"),
    )
}
