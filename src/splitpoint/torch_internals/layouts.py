"""Where torch says of an operator over symbolic sizes that its result lies as it does not.

What lies behind a splitting op is compiled for the layout that torch gives for its result. torch
2.15 picks another kernel of attention where batch and length are both symbols than where they are
numbers, and says that the result is contiguous, when it has the layout of the query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .ones import At
from .operators import op_name, operator_aliases
from .probe import require
from .sizes import Symbols

if TYPE_CHECKING:
    import sympy

BY_KERNEL = "aten::scaled_dot_product_attention"
"""The operator whose result has the layout that a kernel, picked by sizes, gives it."""

LENGTHS = (5, 7, 11, 13, 17, 19, 23, 29)
"""What dynamic dimensions are when layouts are compared."""

ALONE = "splitpoint_alone"
"""In the `meta` of a node that is a step of its own, as splitting ops are."""


def made_contiguous(
    graph: fx.Graph, splitting_ops: Collection[str], symbols: Symbols
) -> list[fx.Node]:
    """Copy, behind each attention that splits the graph and that torch wrongly says to return
    something contiguous, its result to where it is so. The copies, which are `ALONE`."""
    names = operator_aliases(BY_KERNEL) & set(splitting_ops)
    free = sorted(set().union(*(each.free_symbols for each in symbols.values())), key=str)
    sizes = dict(zip(free, itertools.cycle(LENGTHS)))
    lengths = {symbol: int(size.subs(sizes)) for symbol, size in symbols.items()}
    copies = []
    for node in [n for n in graph.nodes if n.op == "call_function" and op_name(n.target) in names]:
        said = node.meta.get("example_value")
        if not isinstance(said, torch.Tensor) or not _lies_otherwise(node, said, lengths):
            continue
        with graph.inserting_after(node):
            copy = graph.call_function(torch.ops.aten.clone.default, (node,))
        node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
        copy.kwargs = {"memory_format": torch.contiguous_format}
        copy.meta = {**node.meta, "example_value": torch.clone(said), ALONE: True}
        copies.append(copy)
    return copies


def _lies_otherwise(node: fx.Node, said: torch.Tensor, lengths: Mapping[sympy.Symbol, int]) -> bool:
    """Whether a result that is said to be contiguous is not, at some lengths."""
    at = At(lengths)
    shape, strides = ([*map(at.size, each)] for each in (said.shape, said.stride()))
    if strides != _contiguous(shape):
        return False
    inputs = [each.meta.get("example_value") for each in node.all_input_nodes]
    tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
    if len(tensors) < len(inputs) or any(
        at.size(size) is None for each in tensors for size in (*each.shape, *each.stride())
    ):
        return False
    require("shapes at a length of 1")
    from torch._subclasses.fake_tensor import FakeTensorMode

    def in_numbers(given: fx.Node) -> Any:
        return at.value(given.meta["example_value"])

    assert callable(node.target)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        found = node.target(
            *fx.map_arg(node.args, in_numbers), **fx.map_arg(node.kwargs, in_numbers)
        )
    return any(
        size > 1 and one != other
        for size, one, other in zip(found.shape, strides, found.stride(), strict=True)
    )


def _contiguous(shape: Sequence[int | None]) -> list[int] | None:
    """The strides of a contiguous tensor; None where a size is not known."""
    known = [size for size in shape if size is not None]
    if len(known) < len(shape):
        return None
    return [math.prod(known[dim + 1 :]) for dim in range(len(known))]
