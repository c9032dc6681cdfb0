"""Let all-reduces that are not fused go through shared memory too."""

from __future__ import annotations

import torch
from torch import fx

from ..collectives import admission, ops
from ..collectives.policy import FUSED
from ..torch_internals.graphs import add_call
from .base import Found
from .collective import Choice, CollectivePass
from .match import Match
from .nodes import FLOATS, name_of, value
from .rmsnorm_pattern import find_reduces


class SharedMemoryAllReduce(CollectivePass):
    """Replace the all-reduces of a graph by those of the group's workspace, where it has one.

    Put it after `AllReduceRMSNorm`, for what that leaves.
    """

    def __init__(self) -> None:
        super().__init__(None)

    def choose(self, found: Match) -> Choice:
        """Never asked: no pattern is looked for."""
        raise NotImplementedError

    def __call__(self, graph: fx.Graph) -> Found:
        """Rewrite the graph in place."""
        ops.register()
        matches = 0
        for node in find_reduces(graph):
            if name_of(node) != "_c10d_functional::all_reduce" or node.args[1] != "sum":
                continue
            source, group = node.args[0], str(node.args[2])
            assert isinstance(source, fx.Node)
            given = value(source)
            if given.dtype not in FLOATS or not admission.admitted(group, given.device) & FUSED:
                continue
            (wait,) = node.users
            with graph.inserting_before(node):
                made = add_call(graph, torch.ops.splitpoint.all_reduce.default, source, group=group)
            wait.replace_all_uses_with(made)
            graph.erase_node(wait)
            graph.erase_node(node)
            matches += 1
        return Found(matches)
