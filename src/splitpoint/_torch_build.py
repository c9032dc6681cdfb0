"""The private torch names that building C++ kernels needs. Checked on torch 2.13.0."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

torch_version: str = torch.__version__
cxx11_abi: bool = torch.compiled_with_cxx11_abi()


def cpp_compiler() -> str | None:
    """The path of the C++ compiler that Inductor uses; None when it would find none.

    Inductor's own search costs a second for the import of its C++ builder. The same answer
    comes at once from what that reads, `CXX` and the platform's default, unless Inductor was
    configured otherwise or has a compiler of its own installed by conda.
    """
    inductor_config = sys.modules.get("torch._inductor.config")
    if inductor_config is None and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        named = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        return shutil.which(named)
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
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]


__all__ = [
    "cpp_compiler",
    "cxx11_abi",
    "include_folders",
    "library_folder",
    "load_library",
    "torch_version",
]
