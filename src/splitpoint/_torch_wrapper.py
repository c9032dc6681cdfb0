"""Private torch names that the code around Inductor's kernels calls.

Checked on torch 2.13.0. Nothing here imports Dynamo or Inductor.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

tree_unflatten = pytree.tree_unflatten
treespec_dumps = pytree.treespec_dumps
treespec_loads = pytree.treespec_loads
TreeSpec = pytree.TreeSpec

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
        return operator(what)._op  # what the operator's own __call__ only forwards to
    if not is_plain_attribute(what):
        raise LookupError(f"{what} is not known")
    return getattr(torch, what.partition(".")[2])


OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
"""An operator, and all overloads of one."""


def operator(name: str) -> Any:
    """The operator "namespace::name.overload".

    Raises:
        LookupError: when it is not registered.
    """
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    return operator_at([namespace, base, overload])


def operator_at(path: Sequence[str]) -> Any:
    """The operator at [namespace, name, overload], or all overloads at [namespace, name].

    Raises:
        LookupError: when it is not registered.
    """
    found: Any = torch.ops
    try:
        for part in path:
            found = getattr(found, part)
    except (AttributeError, RuntimeError) as error:
        name = f"{path[0]}::{'.'.join(path[1:])}"
        raise LookupError(f"no operator {name} is registered") from error
    return found


def operator_path(operator: Any) -> list[str]:
    """What `operator_at` takes."""
    if isinstance(operator, torch._ops.OpOverload):
        packet = operator._overloadpacket
        return [*packet._qualified_op_name.split("::"), operator._overloadname]
    return list(operator._qualified_op_name.split("::"))


def returns_tensors(name: str, wanted: int, by_element: bool) -> bool:
    """Whether an operator returns tensors: a list or at least `wanted` where they are taken
    `by_element`, else one."""
    try:
        returns = operator(name)._schema.returns
    except LookupError:
        return False
    kinds = [str(each.type) for each in returns]
    if not by_element:
        return kinds == ["Tensor"]
    return kinds == ["List[Tensor]"] or (len(kinds) >= max(2, wanted) and set(kinds) == {"Tensor"})


def tensor_operator(target: Any) -> str | None:
    """The name "namespace::name.overload" of an operator that returns one tensor; None for what
    is none, or has overloads that its arguments choose from."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()  # type: ignore[no-untyped-call]
        if len(overloads) != 1:
            return None
        target = getattr(target, overloads[0])
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if [str(each.type) for each in target._schema.returns] != ["Tensor"]:
        return None
    return f"{target._overloadpacket._qualified_op_name}.{target._overloadname}"


def interposed() -> bool:
    """Whether a mode is active that sees the functions, or the operators, that Python calls."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def memory_of(tensor: torch.Tensor) -> int:
    """What two views of the same memory have in common."""
    return int(tensor.untyped_storage()._cdata)


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's `TensorImpl` is."""
    return int(tensor._cdata)


def quick_state() -> tuple[Any, ...]:
    """What of torch's state is compared at every call."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._is_torch_function_enabled(),
    )


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


def state() -> dict[str, Any]:
    """Settings of torch that tracing and compiling look at, as JSON."""
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            getattr(torch.utils.deterministic, "fill_uninitialized_memory", True),
        ],
        "autocast": [
            torch.is_autocast_enabled("cpu") and str(torch.get_autocast_dtype("cpu")),
            torch.is_autocast_enabled("cuda") and str(torch.get_autocast_dtype("cuda")),
            torch.is_autocast_cache_enabled(),
        ],
        "matmul": [
            torch.get_float32_matmul_precision(),
            torch._C._get_cublas_allow_tf32(),
            torch.backends.mkldnn.enabled,
            torch._C._get_mkldnn_deterministic(),
        ],
        "function_modes": [
            torch._C._is_torch_function_enabled(),
            torch._C._len_torch_function_stack(),
        ],
    }


def changed_inductor_config() -> dict[str, Any]:
    """Settings of Inductor's that the program has changed; none when it is not imported."""
    config: Any = sys.modules.get("torch._inductor.config")
    if config is None:
        return {}
    changed = {}
    for name, entry in sorted(config._config.items()):
        # A patch that was undone leaves the default value behind as one that was set.
        if name not in _NO_EFFECT_ON_CODE and not config._is_default(name):
            value = getattr(config, name)
            if value != entry.default:
                changed[name] = value
    return changed


_NO_EFFECT_ON_CODE = frozenset({"compile_threads", "trace.enabled", "verbose_progress"})
