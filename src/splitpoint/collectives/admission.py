"""What serves the fused operators: asked before any policy, and the same on all ranks."""

from __future__ import annotations

import torch

from ..torch_internals import distributed
from . import flashinfer
from .policy import FUSED


def device_key(device: torch.device) -> str:
    """A device as policies name it: "cpu", or the compute capability such as "sm90"."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    return device.type


def admitted(group: str, device: torch.device) -> frozenset[str]:
    """The algorithms that a group's ranks can use on a device.

    The fused ones need a workspace. Attaching one is itself a collective, which succeeds on all
    ranks or on none, so that the answer is the same on all of them.
    """
    served = group in (flashinfer.attached() if device.type == "cuda" else _in_shared_memory())
    return frozenset({"standard", "native", *(FUSED if served else ())})


def state() -> dict[str, object]:
    """What decisions depend on besides the policy, as JSON values: the groups' sizes, and which
    have a workspace."""
    return {
        "groups": distributed.group_sizes(),
        "shared memory": sorted(_in_shared_memory()),
        "flashinfer": sorted(flashinfer.attached()),
    }


def _in_shared_memory() -> frozenset[str]:
    attached = getattr(torch.ops.splitpoint, "shm_attached", None)
    if attached is None:  # the kernels are not loaded, so nothing can be
        return frozenset()
    return frozenset(name for name in distributed.group_sizes() if attached(name))
