"""What passes do to a graph: add calls with their fake values, put nodes in order."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .probe import require


def add_call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call to a graph at its insertion point, with the fake value that it has."""
    node = graph.call_function(target, args, kwargs)
    require("sizes")
    fakes, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    values = (n.meta.get("val") for n in graph.nodes)
    with next(
        v for v in values if isinstance(v, torch._subclasses.fake_tensor.FakeTensor)
    ).fake_mode:
        node.meta["val"] = target(*fakes, **fake_kwargs)
    return node


def with_numbers(module: fx.GraphModule, numbers: Mapping[str, int]) -> fx.GraphModule:
    """A copy of a graph in which some inputs, by name, are numbers wherever they are used. It takes
    them still."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    known = {
        node: numbers[node.name]
        for node in graph.find_nodes(op="placeholder")
        if node.name in numbers
    }
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda each: known.get(each, each)
        )
    return fx.GraphModule(module, graph)


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Let operators compute where a fake tensor mode is on."""
    require("sizes")
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def sort_graph(graph: fx.Graph) -> None:
    """Put nodes after what they use, changing the order as little as that takes."""
    require("compile")
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
