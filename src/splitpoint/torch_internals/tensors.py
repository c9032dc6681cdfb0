"""Which memory a tensor is a view of, and where the object itself is."""

from __future__ import annotations

import torch

from .probe import fits, require

require("state of torch")


def memory_of(tensor: torch.Tensor) -> int | None:
    """What two views of the same memory have in common; None for a tensor that is not one piece of
    memory, such as a sparse one or one that `torch.func` wraps."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None


def have_addresses() -> bool:
    """Whether this version of torch tells `address_of` a tensor."""
    return fits("addresses of tensors")


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's `TensorImpl` is."""
    return int(tensor._cdata)
