"""C++: kernels of linear layers and attention as torch operators, and what runs and checks a range.

`load()` builds it on first use and registers `torch.ops.splitpoint.linear_packed`,
`.linear_gemv`, `.pack_weight`, `.unpack_weight`, `.attention` and `.cached_attention`, whose keys
and values lie in the blocks of a cache; `layout` and `int4` say what a packed weight looks like,
`reference`, `attention` and `cached_attention` hold the same operators in float64. The library also
has the runner (`runner.cpp`) and the watch over a module (`watch.cpp`).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import KernelBuildError
from ..torch_internals.toolchain import load_library
from . import build
from .fakes import register_fakes

_lock = threading.Lock()
_loaded: list[Path] = []
"""The library, once its operators are registered: that can be done once in a process."""


def load() -> None:
    """Make the operators available, building them first if need be. Any thread may call it.

    Raises:
        KernelBuildError: when they cannot be built or loaded here; the message says what to
            install. Callers can go on with Inductor's own kernels.
    """
    with _lock:
        if not _loaded:
            _load(build.library())


def load_from(path: Path) -> None:
    """`load` from a library that was built before, so that no compiler is needed.

    Raises:
        KernelBuildError: when it cannot be loaded here.
    """
    with _lock:
        if not _loaded:
            _load(path)


def loaded_library() -> Path | None:
    """The library whose operators are registered, if any is."""
    return _loaded[0] if _loaded else None


def watch_type() -> Callable[[], Any] | None:
    """The type of `watch.cpp`, whose objects tell whether dicts, objects and tensors are as they
    were; None where the library was built without Python's headers.

    Raises:
        KernelBuildError: as `load`.
    """
    load()
    return _watch_type(_loaded[0])


@functools.cache
def _watch_type(path: Path) -> Callable[[], Any] | None:
    loader = importlib.machinery.ExtensionFileLoader("splitpoint_watch", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
    except ImportError:
        return None
    loader.exec_module(module)
    kind: Callable[[], Any] = module.Watch
    return kind


def _load(path: Path) -> None:
    try:
        load_library(path)
    except OSError as error:
        raise KernelBuildError(
            f"the C++ kernels in {path} cannot be loaded: {error}; delete the file to have them "
            f"built again"
        ) from error
    register_fakes()
    _loaded.append(path)


def available() -> bool:
    """Whether the operators can be used here; builds them if need be."""
    try:
        load()
    except KernelBuildError:
        return False
    return True


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has kernels for, best first.

    Raises:
        KernelBuildError: as `load`.
    """
    load()
    names: list[str] = torch.ops.splitpoint.instruction_sets()
    return names


def use_instruction_set(name: str = "best") -> str:
    """Choose the instruction set of all later calls in this process; returns its name.

    For tests and measurements: `load` starts with the best. Packed weights need no change.

    Raises:
        ValueError: when this CPU has no instruction set of that name.
        KernelBuildError: as `load`.
    """
    load()
    chosen: str = torch.ops.splitpoint.instruction_set(name)
    return chosen
