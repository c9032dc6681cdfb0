"""The runner: built with the other C++ code, or from a library that a store kept."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from .. import kernels
from ..errors import KernelBuildError

log = logging.getLogger("splitpoint")


def program_type() -> Callable[..., Any] | None:
    """The runner's class of programs; None where it cannot be built, which the log says."""
    try:
        kernels.load()
    except KernelBuildError as error:
        log.info("ranges run in Python: %s", error)
        return None
    path = kernels.loaded_library()
    assert path is not None
    return _from(str(path))


@functools.cache
def _from(path: str) -> Callable[..., Any] | None:
    loader = importlib.machinery.ExtensionFileLoader("runner", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        log.info("ranges run in Python: the C++ code was built without Python's headers: %s", error)
        return None
    program: Callable[..., Any] = module.Program
    return program
