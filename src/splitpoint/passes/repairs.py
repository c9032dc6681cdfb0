"""Graphs that Inductor (torch 2.13) compiles wrongly, written so that it does not."""

from __future__ import annotations

import torch
from torch import fx

from ..torch_internals.operators import op_name

REPAIRS = "2"
"""Another one for each change of what `repair` does: keys of what is compiled hold it."""


def repair(graph: fx.Graph) -> None:
    """Rewrite a graph in place.

    An update in place of a view with another dtype (`x.view(torch.int32)[index] = 1`) may be
    written into the memory as numbers of the memory's own dtype. A copy in between is updated
    instead, and goes back as a whole. It is made by `where`, which keeps every bit: Inductor takes
    clones away.
    """
    nodes = list(graph.nodes)
    if not any(op_name(node.target) == "aten::copy_" for node in nodes):
        return  # nothing is updated
    aten = torch.ops.aten
    for node in nodes:
        if node.op == "call_function" and op_name(node.target) == "aten::view.dtype":
            value = node.meta["val"]
            with graph.inserting_after(node):
                kind = {"dtype": torch.bool, "device": value.device}
                always = graph.call_function(aten.full.default, ([], True), kind)
            with graph.inserting_after(always):
                copy = graph.call_function(aten.where.self, (always, node, node))
            always.meta["val"] = value.new_empty((), dtype=torch.bool)
            copy.meta.update(node.meta)
            node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
