"""torch.compile as what cuts a model where no graph can go on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .dynamo import user_line
from .probe import fits, require

MOST_RECOMPILES = 64
"""Graphs of one part of the code, after which torch runs it in Python."""


def cut_and_compile(
    function: Callable[..., Any], backend: Callable[..., Any]
) -> Callable[..., Any]:
    """A callable under torch.compile, which cuts it into as many graphs as it must."""
    known = inspect.signature(torch.compile).parameters
    # From torch 2.13 on, what else runs the same code does not count against the limit.
    own = {"recompile_limit": MOST_RECOMPILES, "isolate_recompiles": True}
    options: dict[str, Any] = {name: value for name, value in own.items() if name in known}
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, **options)
    return compiled


def where_cut(graph_module: fx.GraphModule) -> tuple[str, str] | None:
    """The line at which one of Dynamo's graphs ends before the model does, and what torch says of
    it; None where it does not."""
    if not fits("where graphs are cut"):
        return None
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break or not reason.user_stack:
        return None
    frame = reason.user_stack[-1]
    said = next(iter(reason.reason.strip().splitlines()), "")
    return user_line(frame.filename, frame.lineno or 0, frame.name), said


def dynamic_results(graph_module: fx.GraphModule) -> list[tuple[int, int]]:
    """Results of one of Dynamo's graphs, and their dimensions, that change with its sizes: what
    comes after it in the model is dynamic there."""
    (results,) = graph_module.graph.output_node().args
    assert isinstance(results, (list, tuple))
    found = []
    for index, node in enumerate(results):
        value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
        if isinstance(value, torch.Tensor):
            sizes = enumerate(value.shape)
            found += [(index, dim) for dim, size in sizes if isinstance(size, torch.SymInt)]
    return found


def error_of_backend(error: Exception) -> BaseException | None:
    """What a backend raised, of the error that Dynamo makes of it."""
    return getattr(error, "inner_exception", None)


def is_of_dynamo(error: Exception) -> bool:
    """Whether an error is torch.compile's own, and none of the model's."""
    require("capture")
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def by_inductor(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """One of Dynamo's graphs compiled as torch.compile does it by default."""
    if not fits("graphs without ranges"):
        return graph_module.forward
    from torch._dynamo import lookup_backend

    compiled: Callable[..., Any] = lookup_backend("inductor")(graph_module, inputs)
    return compiled
