"""A piece for one length of some of its dimensions."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from .pieces import Piece


def fixed(piece: Piece, lengths: Mapping[str, int]) -> Piece:
    """A piece that is not given those of its dimensions that have one length."""
    if not set(piece.takes) & set(lengths):
        return piece
    graph_module = copy.deepcopy(piece.graph_module)
    graph = graph_module.graph
    known = {
        node: lengths[name]
        for node, name in zip(graph.find_nodes(op="placeholder"), piece.takes, strict=False)
        if name in lengths
    }

    def length(node: fx.Node) -> Any:
        return known.get(node, node)

    for node in [user for each in known for user in each.users]:
        node.args = fx.node.map_arg(node.args, length)
        node.kwargs = fx.node.map_arg(node.kwargs, length)
    for node in known:
        graph.erase_node(node)
    graph_module.recompile()
    takes = tuple(name for name in piece.takes if name not in lengths)
    text = f"{piece.fingerprint} {sorted(lengths.items())}"
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return replace(piece, graph_module=graph_module, takes=takes, fingerprint=name)
