"""Process groups by name, and the collectives that are operators of a graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .probe import require


def group_name(group: dist.ProcessGroup) -> str:
    """The name under which functional collectives know a process group."""
    return str(group.group_name)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group that functional collectives know by a name.

    Raises:
        LookupError: when there is none of that name.
    """
    require("process groups")
    try:
        return torch._C._distributed_c10d._resolve_process_group(dist.GroupName(name))
    except (RuntimeError, ValueError) as error:
        raise LookupError(f"no process group is named {name!r}") from error


def group_sizes() -> dict[str, int]:
    """The number of ranks of each process group of this process, by name."""
    return {name: group.size() for name, group in _groups().items()}


def ranks() -> dict[str, int]:
    """This process's rank in each of its process groups, by name."""
    return {name: group.rank() for name, group in _groups().items()}


def _groups() -> dict[str, dist.ProcessGroup]:
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    require("process groups")
    groups = dist.distributed_c10d._world.pg_map
    return dict(sorted(((group_name(g), g) for g in groups), key=lambda pair: pair[0]))


def collective_ops() -> Any:
    """The namespace of the operators that functional collectives are in a graph.

    Raises:
        UnsupportedTorch: when this version of torch has others.
    """
    if not torch.compiler.is_compiling():  # where a model that is traced calls one, all is there
        require("process groups")
    return torch.ops._c10d_functional


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """The sum over the group's ranks, in the tensor's dtype."""
    ops = collective_ops()
    reduced: Tensor = ops.wait_tensor(ops.all_reduce(tensor.contiguous(), "sum", group))
    return reduced


def reduce_scatter(tensor: Tensor, group: str) -> Tensor:
    """This rank's share, along dimension 0, of the sum over the group's ranks."""
    ops = collective_ops()
    world = group_of(group).size()
    share: Tensor = ops.wait_tensor(
        ops.reduce_scatter_tensor(tensor.contiguous(), "sum", world, group)
    )
    return share


def all_gather(tensor: Tensor, group: str) -> Tensor:
    """The tensors of the group's ranks, joined along dimension 0."""
    ops = collective_ops()
    world = group_of(group).size()
    whole: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(tensor.contiguous(), world, group))
    return whole
