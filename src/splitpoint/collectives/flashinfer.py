"""The fused operator on NVIDIA GPUs, by FlashInfer's `allreduce_fusion`.

**This has not been run on hardware by this project.** What is checked is that the calls fit the
signatures of FlashInfer 0.7.2, and that their arguments are what its documentation asks for.
FlashInfer is imported by `attach` only, so that nothing of it is needed elsewhere.

What FlashInfer does not have is served by the group's own all-reduce and torch operations: a
residual in float32 beside an input in half precision, an input in float32, fp8 by token with a
weight bias, more tokens than the workspace was made for.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import WorkspaceError
from ..torch_internals import distributed
from . import agreement, ops, reference
from .policy import chosen

PATTERNS = {
    # (quant, whether the norm is returned too): name in flashinfer.comm.AllReduceFusionPattern
    ("none", True): "kARResidualRMSNorm",
    ("none", False): "kARResidualRMSNorm",
    ("fp8_static", False): "kARResidualRMSNormFP8Quant",
    ("fp8_static", True): "kARResidualRMSNormOutFP8Quant",
    ("nvfp4", False): "kARResidualRMSNormFP4Quant",
    ("nvfp4", True): "kARResidualRMSNormOutFP4Quant",
    ("fp8_token", False): "kARResidualRMSNormDynamicFP8Quant",
    ("fp8_token", True): "kARResidualRMSNormOutDynamicFP8Quant",
}
SCALE_LAYOUT = "LINEAR"
"""In flashinfer.comm.QuantizationSFLayout: nvfp4 scales row by row, as the operator has them."""
ONE_SHOT = {"one_shot": True, "two_shot": False, "auto": None}
"""`use_oneshot` by the operator's algorithm; None leaves it to FlashInfer."""
CAPABILITIES = (9, 10)
"""Major compute capabilities that FlashInfer's fused all-reduce is for."""
WORLD_SIZES = (2, 4, 8)


@dataclass(frozen=True)
class Workspace:
    """FlashInfer's buffers for one group, and its module."""

    comm: Any
    """`flashinfer.comm`."""
    handle: Any
    max_elements: int
    """Of an input: tokens * hidden."""
    dtype: torch.dtype


def attach(group: dist.ProcessGroup, *, max_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """Let FlashInfer serve the operator for a group on CUDA. Collective: all ranks call it, and
    it succeeds on all of them or on none.

    Args:
        group: of 2, 4 or 8 ranks, each with a GPU of compute capability 9 or 10.
        max_tokens: the most tokens of a call, at `hidden`; larger calls are served otherwise.
        hidden: hidden size of the largest call.
        dtype: torch.bfloat16 or torch.float16.

    Raises:
        WorkspaceError: when a rank has no such GPU or no FlashInfer, or cannot make its
            buffers; on every rank, with the reason of the first.
    """
    problem = unsupported(group.size(), dtype)
    agreement.vote(group, problem, WorkspaceError)
    name = distributed.group_name(group)
    made: Workspace | None = None
    try:
        comm = _flashinfer_comm()
        handle = comm.create_allreduce_fusion_workspace(
            **workspace_arguments(group, max_tokens=max_tokens, hidden=hidden, dtype=dtype)
        )
        made = Workspace(comm, handle, max_tokens * hidden, dtype)
    except (ImportError, RuntimeError, ValueError) as error:
        problem = f"FlashInfer cannot make its workspace: {error}"
    try:
        agreement.vote(group, problem, WorkspaceError)
    except WorkspaceError:
        if made is not None:
            made.handle.destroy()
        raise
    assert made is not None
    _register()
    with _lock:
        _workspaces()[name] = made


def detach(group: dist.ProcessGroup) -> None:
    """Give a group's workspace back; all ranks call it. Without one it does nothing."""
    with _lock:
        workspace = _workspaces().pop(distributed.group_name(group), None)
    if workspace is not None:
        workspace.handle.destroy()


def attached() -> frozenset[str]:
    """The names of the groups that have a workspace."""
    return frozenset(_workspaces())


def unsupported(world_size: int, dtype: torch.dtype) -> str | None:
    """Why FlashInfer cannot serve a group from this process; None when it can."""
    if world_size not in WORLD_SIZES:
        return f"FlashInfer serves {WORLD_SIZES} ranks, and the group has {world_size}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer serves bfloat16 and float16, not {dtype}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        return f"FlashInfer serves compute capabilities {CAPABILITIES}, not {major}.{minor}"
    return None


def _flashinfer_comm() -> Any:
    try:
        import flashinfer.comm
    except ImportError as error:
        raise ImportError(f"{error}: pip install flashinfer-python") from error
    return flashinfer.comm


# --- the calls -------------------------------------------------------------------------


def workspace_arguments(
    group: dist.ProcessGroup, *, max_tokens: int, hidden: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of `create_allreduce_fusion_workspace`."""
    return {
        "backend": "auto",
        "world_size": group.size(),
        "rank": group.rank(),
        "max_token_num": max_tokens,
        "hidden_dim": hidden,
        "dtype": dtype,
        "group": group,
    }


def serves(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    weight_bias: float,
    quant: str,
    max_elements: int,
    dtype: torch.dtype,
) -> bool:
    """Whether FlashInfer has what a call asks for."""
    return (
        input.dtype == dtype
        and weight.dtype == dtype
        and (residual is None or residual.dtype == dtype)
        and 0 < input.numel() <= max_elements
        and not (quant == "fp8_token" and weight_bias)
    )


def fusion_call(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    quant_scale: Tensor | None,
    *,
    eps: float,
    weight_bias: float,
    quant: str,
    want_norm: bool,
    algorithm: str,
) -> tuple[str, dict[str, Any]]:
    """A pattern's name, and the arguments of `allreduce_fusion` besides workspace, pattern and
    layout: outputs are made here, and all tensors are [tokens, hidden] and contiguous."""
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    tokens, hidden = rows.shape
    # Every pattern adds a residual.
    given = torch.zeros_like(rows) if residual is None else residual.reshape_as(rows).contiguous()
    wants = want_norm or quant == "none"
    arguments: dict[str, Any] = {
        "input": rows,
        "residual_in": given,
        "residual_out": torch.empty_like(rows),
        "norm_out": torch.empty_like(rows) if wants else None,
        "rms_gamma": weight.contiguous(),
        "rms_eps": eps,
        "weight_bias": weight_bias,
        "use_oneshot": ONE_SHOT[chosen(algorithm, input.nbytes)],
        "fp32_acc": True,
    }
    if quant in ("fp8_static", "fp8_token"):
        arguments["quant_out"] = torch.empty_like(rows, dtype=reference.FP8)
    if quant == "fp8_token":
        arguments["scale_out"] = rows.new_empty((tokens, 1), dtype=torch.float32)
    if quant == "nvfp4":
        blocks = hidden // reference.FP4_BLOCK
        arguments["quant_out"] = rows.new_empty((tokens, hidden // 2), dtype=torch.uint8)
        arguments["scale_out"] = rows.new_empty((tokens, blocks), dtype=reference.FP8)
    if quant_scale is not None:
        arguments["scale_factor"] = quant_scale
    return PATTERNS[quant, wants], arguments


def allreduce_rmsnorm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    quant_scale: Tensor | None,
    *,
    group: str,
    eps: float,
    weight_bias: float = 0.0,
    quant: str = "none",
    want_norm: bool = True,
    want_residual: bool = True,
    algorithm: str = "auto",
) -> reference.Fused:
    """The operator on CUDA: by FlashInfer where the group has a workspace that serves the call,
    else by the reference. Which of them depends on what all ranks have in common."""
    workspace = _workspaces().get(group)
    if (
        workspace is None
        or algorithm == "reference"
        or not serves(
            input,
            residual,
            weight,
            weight_bias=weight_bias,
            quant=quant,
            max_elements=workspace.max_elements,
            dtype=workspace.dtype,
        )
    ):
        return reference.allreduce_rmsnorm(
            input,
            residual,
            weight,
            quant_scale,
            group=group,
            eps=eps,
            weight_bias=weight_bias,
            quant=quant,
            want_norm=want_norm,
            want_residual=want_residual,
        )
    reference.check(input, residual, weight, quant_scale, quant)
    pattern, arguments = fusion_call(
        input,
        residual,
        weight,
        quant_scale,
        eps=eps,
        weight_bias=weight_bias,
        quant=quant,
        want_norm=want_norm,
        algorithm=algorithm,
    )
    comm = workspace.comm
    if quant == "nvfp4":
        arguments["layout_code"] = getattr(comm.QuantizationSFLayout, SCALE_LAYOUT)
    comm.allreduce_fusion(
        workspace=workspace.handle,
        pattern=getattr(comm.AllReduceFusionPattern, pattern),
        **arguments,
    )
    lead = input.shape[:-1]

    def shaped(result: Tensor | None, wanted: bool, empty: torch.dtype) -> Tensor:
        if result is None or not wanted:
            return input.new_empty(0, dtype=empty)
        return result.reshape(*lead, math.prod(result.shape[1:]))

    quantised, scales = arguments.get("quant_out"), arguments.get("scale_out")
    return reference.Fused(
        shaped(arguments["norm_out"], want_norm, input.dtype),
        shaped(arguments["residual_out"], want_residual, input.dtype),
        shaped(quantised, True, torch.uint8),
        shaped(scales, True, torch.float32),
    )


def allreduce_rmsnorm_both(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    group: str,
    eps: float,
    weight_bias: float,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    """`allreduce_rmsnorm` without quantisation: the norm and the sum."""
    fused = allreduce_rmsnorm(
        input,
        residual,
        weight,
        None,
        group=group,
        eps=eps,
        weight_bias=weight_bias,
        algorithm=algorithm,
    )
    return fused.norm, fused.residual


# --- registration ----------------------------------------------------------------------

_lock = threading.Lock()


@functools.cache
def _workspaces() -> dict[str, Workspace]:
    """By group: the operator knows its group by name only."""
    return {}


@functools.cache  # a library unregisters what it defined when it is collected
def _register() -> torch.library.Library:
    ops.register()
    library = torch.library.Library("splitpoint", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("allreduce_rmsnorm", allreduce_rmsnorm, "CUDA")  # type: ignore[no-untyped-call]
    library.impl(  # type: ignore[no-untyped-call]
        "allreduce_rmsnorm.both", allreduce_rmsnorm_both, "CUDA"
    )
    return library
