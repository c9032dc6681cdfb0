"""What C++ is built with: the compiler, the headers and libraries of torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from .probe import fits

TORCH_VERSION: str = torch.__version__


CXX11_ABI: bool = torch.compiled_with_cxx11_abi()


def cpp_compiler() -> str | None:
    """The path of the C++ compiler that Inductor uses; None when it would find none.

    Inductor's own search costs a quarter of a second, for the import of its C++ builder. The same
    answer comes at once from what that reads, `CXX` and Inductor's configuration, unless it may
    install a compiler of its own by conda.
    """
    if os.environ.get("TORCH_INDUCTOR_INSTALL_GXX") and fits("Inductor's C++ compiler"):
        return _inductors_own()
    named: Any = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    inductor_config = sys.modules.get("torch._inductor.config")
    if inductor_config is not None and fits("the name of Inductor's C++ compiler"):
        named = inductor_config.cpp.cxx
    names = named if isinstance(named, (list, tuple)) else [named]
    found = (shutil.which(name) for name in names if name is not None)
    return next(filter(None, found), None)


def _inductors_own() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None


def include_folders() -> tuple[Path, ...]:
    """The folders of torch's C++ headers."""
    include = Path(torch.__file__).parent / "include"
    return (include, include / "torch" / "csrc" / "api" / "include")


def library_folder() -> Path:
    """The folder of torch's shared libraries."""
    return Path(torch.__file__).parent / "lib"


def load_library(path: Path) -> None:
    """Load a shared library and register the operators in it.

    Raises:
        OSError: when it cannot be loaded.
    """
    # As torch.ops.load_library does, which would look up first where a link leads: the name of an
    # open descriptor must reach the loader as it is.
    ctypes.CDLL(str(path))
