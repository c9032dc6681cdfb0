"""See at the price of a few thousand loads that nothing in a module tree was changed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from . import kernels
from .errors import KernelBuildError

log = logging.getLogger("splitpoint")

_HOOKS = tuple(name for name in vars(torch.nn.Module()) if "_hooks" in name)
"""The dicts of a module that hold hooks."""


class ModuleWatch:
    """Compares the dicts of a module tree, and tensors, with what they were at `renew`.

    Sees attributes, parameters, buffers and submodules that are added, removed or replaced,
    and tensors whose memory, dtype or shape is exchanged. What an attribute refers to may
    change unseen (a list that grows, say), and so may a module's `__class__`.
    """

    def __init__(self, owner: torch.nn.Module, hooks: bool = False) -> None:
        self.owner = owner
        self.hooks = hooks
        """Whether hooks that are added or removed are seen too."""
        self._handle = -1
        self._held: list[Any] = []

    def renew(self, tensors: Sequence[torch.Tensor], versioned: Collection[int]) -> bool:
        """Take things as they are now; of tensors whose id is in `versioned`, in-place updates
        count as changes too. False when this Python has no means to watch dicts."""
        modules = list(self.owner.modules())
        dicts: list[dict[str, Any]] = []
        for module in modules:
            dicts += (vars(module), module._parameters, module._buffers, module._modules)
        if self.hooks:
            for module in modules:
                dicts += (vars(module)[name] for name in _HOOKS if name in vars(module))
        flags = [int(id(tensor) in versioned) for tensor in tensors]
        first = self._handle < 0
        handle = torch.ops.splitpoint.watch(self._handle, list(map(id, dicts)), tensors, flags)
        if handle < 0:
            return False
        self._held = dicts  # an address stays theirs as long as they live
        self._handle = handle
        if first:
            weakref.finalize(self, torch.ops.splitpoint.unwatch, handle)
        return True

    def check(self) -> Callable[[], bool]:
        """A function that tells whether all is as it was at the last `renew`."""
        handle, unchanged = self._handle, torch.ops.splitpoint.unchanged.default

        def check() -> bool:
            return bool(unchanged(handle))

        return check


def watch(
    owner: torch.nn.Module | None, tensors: Sequence[torch.Tensor], hooks: bool = False
) -> ModuleWatch | None:
    """A watch over a module tree and tensors; None where there is no module or no means."""
    if owner is None or any(t.layout != torch.strided or t.is_meta for t in tensors):
        return None
    try:
        kernels.load()
    except KernelBuildError as error:
        log.info("modules are checked by torch's guards alone: %s", error)
        return None
    made = ModuleWatch(owner, hooks)
    return made if made.renew(tensors, ()) else None
