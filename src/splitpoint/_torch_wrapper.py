"""Private torch names that the code around Inductor's kernels calls.

Checked on torch 2.13.0. Nothing here imports Dynamo or Inductor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

_EXTERN_KERNELS = ("mm", "addmm", "bmm", "baddbmm", "_int_mm", "convolution")
"""Kernels of Inductor's `extern_kernels` that are torch's functions of the same name."""


@functools.cache
def helpers() -> Mapping[str, Any]:
    """What Inductor's generated code names, by name."""
    guards: Any = torch._C._dynamo.guards
    return {
        "math": math,
        "inf": math.inf,
        "nan": math.nan,
        "device": torch.device,
        "empty_strided": torch.empty_strided,
        "empty_strided_cpu": guards._empty_strided_cpu,
        "reinterpret_tensor": guards._reinterpret_tensor,
        "assert_size_stride": guards.assert_size_stride,
        "assert_alignment": guards.assert_alignment,
        "increment_version": torch.autograd.graph.increment_version,
    }


def is_plain_attribute(text: str) -> bool:
    """Whether "torch.name" or "extern_kernels.name" is known to `named`."""
    owner, _, name = text.partition(".")
    if owner == "extern_kernels":
        return name in _EXTERN_KERNELS
    return isinstance(getattr(torch, name, None), torch.dtype)


def named(what: str) -> Any:
    """An operator "namespace::name.overload", a dtype "torch.name" or a kernel.

    Raises:
        LookupError: when there is none of that name.
    """
    if "::" in what:
        namespace, _, rest = what.partition("::")
        name, _, overload = rest.partition(".")
        try:
            operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        except (AttributeError, RuntimeError) as error:
            raise LookupError(f"no operator {what} is registered") from error
        return operator._op  # what the operator's own __call__ does nothing but forward to
    if not is_plain_attribute(what):
        raise LookupError(f"{what} is not known")
    return getattr(torch, what.partition(".")[2])
