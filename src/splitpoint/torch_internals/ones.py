"""Where a graph's shapes are others than its symbols say: at a length of 1.

Dynamo is told not to ask whether a length is 1 (`backed_size_oblivious`), so that one graph serves
1 too. What has another shape there, as what `squeeze` returns has, then has that of longer ones in
the graph, without a guard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .probe import require

if TYPE_CHECKING:
    import sympy


def other_shape(graph_module: fx.GraphModule, lengths: Mapping[sympy.Symbol, int]) -> str | None:
    """The first node of a captured graph that has another shape than its symbols say, at some
    lengths; None where all have that, or where it cannot be told (operators of higher order, and
    contexts that a graph enters).

    Nothing is computed: shapes alone pass through the graph.
    """
    require("shapes at a length of 1")
    if any(map(_is_opaque, graph_module.graph.nodes)):
        return None
    from torch._subclasses.fake_tensor import FakeTensorMode

    at = At(lengths)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [
            at.value(node.meta["example_value"])
            for node in graph_module.graph.find_nodes(op="placeholder")
        ]
        shapes = _Shapes(graph_module, at)
        try:
            shapes.run(*inputs)
        except _Differs as found:
            return str(found)
        except (RuntimeError, IndexError, ValueError) as error:  # as eager would say
            said, *_ = [*str(error).strip().splitlines(), type(error).__name__]
            return said
    return None


def _is_opaque(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or ""
    return isinstance(node.target, torch._ops.HigherOrderOperator) or module.startswith("torch.amp")


def _place(node: fx.Node) -> str:
    """ ", at file.py:12 in forward", where that is known."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.stack_trace or "")
    return ", at {}:{} in {}".format(*frames[-1]) if frames else ""


class _Differs(Exception):
    pass


class At:
    """What symbolic sizes are at some lengths."""

    def __init__(self, lengths: Mapping[sympy.Symbol, int]) -> None:
        self._lengths = dict(lengths)
        self._known: dict[Any, int | None] = {}

    def size(self, given: Any) -> int | None:
        """None where that depends on more than the lengths."""
        if not isinstance(given, torch.SymInt):
            return int(given)
        expression = given.node.expr
        if expression not in self._known:
            found = expression.subs(self._lengths)
            self._known[expression] = int(found) if found.is_Integer else None
        return self._known[expression]

    def value(self, given: Any) -> Any:
        """An input of the graph."""
        if not isinstance(given, torch.Tensor):
            return self.size(given)
        shape: list[Any] = [self.size(each) for each in given.shape]
        strides: list[Any] = [self.size(each) for each in given.stride()]
        return torch.empty_strided(shape, strides, dtype=given.dtype, device=given.device)


class _Shapes(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, at: At) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self._at = at

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.op in ("call_function", "call_method", "call_module"):
            self._compare(node, node.meta.get("example_value"), result)
        return result

    def _compare(self, node: fx.Node, said: Any, found: Any) -> None:
        if isinstance(said, Sequence) and isinstance(found, Sequence):
            if len(said) != len(found):
                raise _Differs(f"{node.name} has {len(found)} results then{_place(node)}")
            for one, other in zip(said, found, strict=True):
                self._compare(node, one, other)
        if not isinstance(said, torch.Tensor) or not isinstance(found, torch.Tensor):
            return
        sizes = [*map(self._at.size, said.shape)]
        same = len(sizes) == found.dim() and all(
            size is None or size == length for size, length in zip(sizes, found.shape, strict=True)
        )
        if not same:
            raise _Differs(f"{node.name} has another shape then{_place(node)}")
