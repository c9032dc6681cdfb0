"""Compile a PyTorch model once per range of sizes; send each call to the graph of its range.

What users import is imported when it is asked for: a plug-in in another program, which may need a
part of this package or nothing of it, does not wait for the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import compile
    from .config import Config
    from .errors import SplitpointError
    from .passes.base import Pass, current_range
    from .ranges import Plan, PlannedRange, Range
    from .runtime.compiled_model import CompiledModel
    from .runtime.compiled_module import CompiledModule
    from .runtime.stats import Stats

__all__ = [
    "CompiledModel",
    "CompiledModule",
    "Config",
    "Pass",
    "Plan",
    "PlannedRange",
    "Range",
    "SplitpointError",
    "Stats",
    "compile",
    "current_range",
]
__version__ = "0.1.0"

_WHERE = {
    "CompiledModel": "runtime.compiled_model",
    "CompiledModule": "runtime.compiled_module",
    "Config": "config",
    "Pass": "passes.base",
    "Plan": "ranges",
    "PlannedRange": "ranges",
    "Range": "ranges",
    "SplitpointError": "errors",
    "Stats": "runtime.stats",
    "compile": "api",
    "current_range": "passes.base",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
