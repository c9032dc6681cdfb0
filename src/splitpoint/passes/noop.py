"""Remove operations that return their input unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..torch_internals.operators import op_name
from ..torch_internals.sizes import statically_at_most, statically_equal
from .base import Pass


def _same_shape(node: fx.Node, value: torch.Tensor, result: torch.Tensor) -> bool:
    return len(value.shape) == len(result.shape) and all(
        map(statically_equal, value.shape, result.shape)
    )


def _whole(node: fx.Node, value: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether a slice takes all of its dimension: `x[:64]` does in [1,64], not in [65,512]."""
    given: list[Any] = list(node.args[1:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    if not isinstance(dim, int) or start not in (0, None) or step != 1:
        return False
    return end is None or (isinstance(end, int) and statically_at_most(value.shape[dim], end))


def _same_dtype(node: fx.Node, value: torch.Tensor, result: torch.Tensor) -> bool:
    return (
        value.dtype == result.dtype
        and value.device == result.device
        and _same_shape(node, value, result)
        and all(map(statically_equal, value.stride(), result.stride()))
    )


NOOPS: dict[str, Callable[[fx.Node, torch.Tensor, torch.Tensor], bool]] = {
    "aten::slice.Tensor": _whole,
    "aten::view": _same_shape,
    "aten::reshape": _same_shape,
    "aten::_unsafe_view": _same_shape,
    "aten::expand": _same_shape,
    "prims::convert_element_type": _same_dtype,
    "aten::_to_copy": _same_dtype,
}
"""By operator: whether a node returns its first argument as it is, given their fake values."""


class NoopElimination(Pass):
    """Remove views, slices, expands and casts that change nothing for the range."""

    asks_torch = True

    def __call__(self, graph: fx.Graph) -> int:
        """Rewrite the graph in place and return how many operations were removed."""
        removed = 0
        outputs = set(graph.output_node().all_input_nodes)
        for node in list(graph.nodes):
            changes_nothing = NOOPS.get(op_name(node.target))
            if changes_nothing is None:
                continue
            source = node.args[0]
            # An output that became an input, or another output, would change aliasing.
            if node in outputs and (source.op == "placeholder" or source in outputs):
                continue
            value, result = source.meta.get("val"), node.meta.get("val")
            if not (isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor)):
                continue
            if changes_nothing(node, value, result):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                removed += 1
        return removed
