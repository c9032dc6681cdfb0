"""What serves the fused operators: asked before any policy, and the same on all ranks."""

from __future__ import annotations

import torch

from .. import _torch_distributed
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
    return frozenset({"standard", "native", *(FUSED if group in _attached() else ())})


def state() -> dict[str, object]:
    """What decisions depend on besides the policy, as JSON values: the groups' sizes, and which
    have a workspace."""
    return {"groups": _torch_distributed.group_sizes(), "attached": sorted(_attached())}


def _attached() -> frozenset[str]:
    return flashinfer.attached()
