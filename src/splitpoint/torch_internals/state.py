"""Modes and settings of torch that tracing and calls depend on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from .probe import fits, require

require("state of torch")

set_grad_enabled: Callable[[bool], object] = (
    torch._C._set_grad_enabled if fits("grad mode") else torch.set_grad_enabled
)
"""Sets grad mode; 50 ns, where `torch.no_grad()` takes over 500."""


def interposed() -> bool:
    """Whether a mode is active that sees the functions, or the operators, that Python calls."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def no_dispatch_modes() -> contextlib.AbstractContextManager[object]:
    """Without the modes that see operators: tensors look different to guards while one is on."""
    if not fits("dispatch modes"):
        return contextlib.nullcontext()
    from torch.utils._python_dispatch import _disable_current_modes

    off: contextlib.AbstractContextManager[object] = _disable_current_modes()
    return off


QUICK_STATE = (
    "torch.get_num_threads()",
    "torch.get_default_dtype()",
    "torch.is_autocast_enabled('cpu')",
    "torch.are_deterministic_algorithms_enabled()",
    "the number of modes over torch's functions",
    "whether torch's functions can be overridden",
)
"""What `quick_state` returns, in words."""


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


def torch_state() -> dict[str, Any]:
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
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.mkldnn.enabled,
            torch.backends.mkldnn.deterministic,
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
    if not fits("settings of Inductor"):
        return dict(config.get_config_copy())
    changed = {}
    for name, entry in sorted(config._config.items()):
        # A patch that was undone leaves the default value behind as one that was set.
        if name not in _NO_EFFECT_ON_CODE and not config._is_default(name):
            value = getattr(config, name)
            if value != entry.default:
                changed[name] = value
    return changed


_NO_EFFECT_ON_CODE = frozenset({"compile_threads", "trace.enabled", "verbose_progress"})
