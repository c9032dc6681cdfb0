"""Remove operations that return their input unchanged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from .. import _torch
from .base import Pass


def _same_shape(value: torch.Tensor, result: torch.Tensor) -> bool:
    return len(value.shape) == len(result.shape) and all(
        _torch.statically_equal(a, b) for a, b in zip(value.shape, result.shape, strict=True)
    )


def _same_dtype(value: torch.Tensor, result: torch.Tensor) -> bool:
    return (
        value.dtype == result.dtype
        and value.device == result.device
        and _same_shape(value, result)
        and all(
            _torch.statically_equal(a, b)
            for a, b in zip(value.stride(), result.stride(), strict=True)
        )
    )


NOOPS: dict[str, Callable[[torch.Tensor, torch.Tensor], bool]] = {
    # A slice, view or expand of unchanged shape leaves every element where it was. Whether
    # a slice `x[:64]` does depends on the range: it does in [1,64] and not in [65,512].
    "aten::slice.Tensor": _same_shape,
    "aten::view": _same_shape,
    "aten::reshape": _same_shape,
    "aten::_unsafe_view": _same_shape,
    "aten::expand": _same_shape,
    "prims::convert_element_type": _same_dtype,
    "aten::_to_copy": _same_dtype,
}
"""By operator: whether its result is its first argument, from their (fake) values."""


class NoopElimination(Pass):
    """Remove views, slices, expands and casts that change nothing for the range."""

    def __call__(self, graph: fx.Graph) -> int:
        """Rewrite the graph in place and return how many operations were removed."""
        removed = 0
        outputs = set(graph.output_node().all_input_nodes)
        for node in list(graph.nodes):
            changes_nothing = NOOPS.get(_torch.op_name(node.target))
            if changes_nothing is None:
                continue
            source = node.args[0]
            # An output that became an input, or another output, would change aliasing.
            if node in outputs and (source.op == "placeholder" or source in outputs):
                continue
            value, result = source.meta.get("val"), node.meta.get("val")
            if not (isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor)):
                continue
            if changes_nothing(value, result):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                removed += 1
        return removed
