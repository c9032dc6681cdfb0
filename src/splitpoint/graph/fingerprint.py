"""What a piece computes, as text and as a hash: equal for pieces that compute the same."""

from __future__ import annotations

import ctypes
import hashlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..torch_internals.operators import (
    is_builtin_target,
    op_name,
    operator_schema,
)
from ..torch_internals.sizes import (
    Symbols,
    expression_of,
    in_terms_of_size,
)


def attribute(root: fx.GraphModule, path: str) -> Any:
    """What a `get_attr` node of a graph stands for."""
    return operator.attrgetter(path)(root)


def describe(graph_module: fx.GraphModule, values: Sequence[Any], symbols: Symbols) -> str:
    """What a piece computes, as text that is equal in every process.

    Raises:
        NotPortable: when that depends on objects or code of this process.
    """
    rows = [_describe_value(value, symbols) for value in values]
    rows += [*_portable_targets(graph_module), *_describe_graph(graph_module)]
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
            inner = attribute(graph_module, node.target)
            if isinstance(inner, fx.GraphModule):
                yield from _portable_targets(inner)
        elif node.op == "call_function":
            schema = operator_schema(node.target)
            if schema is not None:
                yield schema
            elif not is_builtin_target(node.target):
                raise NotPortable(f"a call of {op_name(node.target)}")


def fingerprint(graph_module: fx.GraphModule, values: Sequence[Any], symbols: Symbols) -> str:
    """A hash of what a piece computes: operators, topology, constants and kinds of inputs.

    Names, stack traces and module paths are left out.
    """
    rows = [_describe_value(value, symbols) for value in values]
    rows += _describe_graph(graph_module)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def _describe_value(value: torch.Tensor, symbols: Symbols) -> str:
    def dim(n: object) -> str:
        expr = expression_of(n)
        assert expr is not None
        return str(in_terms_of_size(expr, symbols))

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
            rows.append(f"attribute {_describe_attribute(attribute(graph_module, node.target))}")
        else:
            target = "" if node.op in ("placeholder", "output") else _describe_target(node.target)
            rows.append(f"{node.op} {target} {describe(node.args)} {describe(node.kwargs)}")
    return rows


def _describe_target(target: Any) -> str:
    name = op_name(target)
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
