"""What the code around Inductor's kernels calls, by the names that it has there."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .operators import find_operator
from .probe import fits
from .triton_kernels import aligned, raw_stream

_EXTERN_KERNELS = ("mm", "addmm", "bmm", "baddbmm", "_int_mm", "convolution")
"""Kernels of Inductor's `extern_kernels` that are torch's functions of the same name."""


@functools.cache
def generated_code_names() -> Mapping[str, Any]:
    """What Inductor's generated code names, by name."""
    found = {
        "math": math,
        "inf": math.inf,
        "nan": math.nan,
        "device": torch.device,
        "empty_strided": torch.empty_strided,
        "increment_version": torch.autograd.graph.increment_version,
        "cuda_device": torch.cuda.device,
        "get_raw_stream": raw_stream,
        "aligned": aligned,
    }
    if fits("generated code"):
        guards: Any = torch._C._dynamo.guards
        found |= {
            "empty_strided_cpu": guards._empty_strided_cpu,
            "empty_strided_cuda": guards._empty_strided_cuda,
            "reinterpret_tensor": guards._reinterpret_tensor,
            "assert_size_stride": guards.assert_size_stride,
            "assert_alignment": guards.assert_alignment,
            "assert_dtype": assert_dtype,
        }
    return found


def assert_dtype(tensor: torch.Tensor, dtype: torch.dtype, operator_name: str) -> None:
    """What torch asserts from 2.14 on of what an operator returns, beside its shape.

    Raises:
        RuntimeError: when the tensor has another dtype.
    """
    if tensor.dtype != dtype:
        raise RuntimeError(
            f"expected dtype {dtype} but got {tensor.dtype}\nError in op: {operator_name}"
        )


def is_plain_attribute(text: str) -> bool:
    """Whether "torch.name" or "extern_kernels.name" is known to `named`."""
    owner, _, name = text.partition(".")
    if owner == "extern_kernels":
        return name in _EXTERN_KERNELS
    return isinstance(getattr(torch, name, None), torch.dtype)


def named_object(what: str) -> Any:
    """An operator "namespace::name.overload", a dtype "torch.name" or a kernel.

    Raises:
        LookupError: when there is none of that name.
    """
    if "::" in what:
        found = find_operator(what)
        return found._op if fits("operators without Python") else found
    if not is_plain_attribute(what):
        raise LookupError(f"{what} is not known")
    return getattr(torch, what.partition(".")[2])


def load_kernel(path: Path, name: str, symbol: str) -> Callable[..., Any]:
    """A function of a shared library of C++ kernels. `name` tells it from other libraries.

    Raises:
        ImportError: when it cannot be loaded.
    """
    guards: Any = torch._C._dynamo.guards
    # Where the library finds how to get at a tensor's memory, without torch's headers.
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(
        guards._torchinductor_pyobject_tensor_data_ptr
    )
    loader = importlib.machinery.ExtensionFileLoader(f"{name}.{symbol}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    kernel: Callable[..., Any] = getattr(module, symbol)
    return kernel


def kernel_place(kernel: Callable[..., Any]) -> tuple[str, str]:
    """The path of the shared library that a C++ kernel comes from, and its name there."""
    return kernel.__self__.__file__, kernel.__name__  # type: ignore[attr-defined]
