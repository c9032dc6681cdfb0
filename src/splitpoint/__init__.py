"""Compile a PyTorch model once per range of sizes; send each call to the graph of its range."""

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
