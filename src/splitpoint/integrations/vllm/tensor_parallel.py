"""vLLM's all-reduces as this package's, which its passes know, over this package's shared memory.

vLLM's model calls an operator that sums a tensor in place over the ranks, for a handle that is a
number of one process. In the graph it becomes an operator that returns the sum, for a process group
by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ...collectives import ops, workspace
from ...errors import WorkspaceError
from ...ranges import Range
from ...torch_internals.distributed import group_name
from ...torch_internals.tensors import memory_of
from . import names
from .fence import log

PATIENCE_S = 600.0
"""How long a rank may wait for one that still compiles."""


@dataclass(frozen=True)
class Ranks:
    """The tensor-parallel group of this process, and how vLLM's operator knows it."""

    group: str
    handle: int


def attach() -> Ranks | None:
    """Share memory between the tensor-parallel ranks, all of which call this; None where there is
    one rank, or where vLLM's own all-reduce stays."""
    group = names.TP_GROUP.value()
    if group.world_size == 1:
        return None
    distributed = getattr(group.device_communicator, "dist_module", None)
    handle = getattr(distributed, "handle", None)
    if not isinstance(handle, int):
        log.warning("Splitpoint: all-reduces are left to vLLM: its ranks share no memory")
        return None
    try:
        made = workspace.attach(group.device_group, timeout_s=PATIENCE_S)
    except WorkspaceError as error:
        log.warning("Splitpoint: all-reduces are left to vLLM: %s", error)
        return None
    assert made.group == group_name(group.device_group)
    return Ranks(made.group, handle)


def attached_group() -> str | None:
    """The name of the tensor-parallel group, if its ranks share memory by `attach`."""
    group = names.TP_GROUP.value()
    if group.world_size == 1:
        return None
    name = group_name(group.device_group)
    return name if workspace.is_attached(name) else None


def left(graph: fx.Graph) -> str | None:
    """What a graph has of vLLM's all-reduces, if anything: their handle is a number of this
    process."""
    left_ = [node for node in graph.nodes if _is_vllms(node)]
    return f"{len(left_)} all-reduces of vLLM's own" if left_ else None


def _is_vllms(node: fx.Node) -> bool:
    return str(node.target).removesuffix(".default") == names.ALL_REDUCE


def replace(graph: fx.Graph, ranks: Ranks) -> int:
    """Put this package's all-reduce in the place of vLLM's; how many there were.

    A sum that is seen by another name afterwards (a view that was made before, an argument of the
    graph) stays as it is.
    """
    ops.register()
    replaced = 0
    for node in list(graph.nodes):
        if not _is_vllms(node):
            continue
        handle, summed = node.args
        assert isinstance(summed, fx.Node)
        if handle != ranks.handle or _is_seen_otherwise(summed, node):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(
                torch.ops.splitpoint.all_reduce.default, (summed,), {"group": ranks.group}
            )
        made.meta["example_value"] = torch.empty_like(summed.meta["example_value"])
        for user in _after(summed, node):
            user.replace_input_with(summed, made)
        graph.erase_node(node)
        replaced += 1
    return replaced


def _is_seen_otherwise(summed: fx.Node, reduce: fx.Node) -> bool:
    """Whether another name of a tensor's memory is used after it was summed in place."""
    memory = _memory(summed)
    names_ = [node for node in reduce.graph.nodes if _memory(node) == memory]
    return any(
        node.op in ("placeholder", "get_attr") or (node is not summed and _after(node, reduce))
        for node in names_
        if node < reduce
    )


def _after(node: fx.Node, reduce: fx.Node) -> list[fx.Node]:
    """The users of a node that come after another one."""
    return [user for user in node.users if user > reduce]


def _memory(node: fx.Node) -> object:
    """What is the same for tensors that share memory, in a graph as Dynamo makes it."""
    value = node.meta.get("example_value")
    memory = memory_of(value) if isinstance(value, torch.Tensor) else None
    return node if memory is None else memory


def said(matched: Mapping[Range, int], reduces: int) -> str:
    """How many of the graph's all-reduces were fused with the norm that follows, by range."""
    counts = ", ".join(f"{count} in {range_}" for range_, count in sorted(matched.items()))
    return f"{reduces} all-reduces over its shared memory; fused with a norm: {counts or 'none'}"
