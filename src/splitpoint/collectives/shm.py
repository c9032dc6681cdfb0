"""The shared-memory collectives in C++: build them, load them, choose their instruction set."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import torch

from ..errors import KernelBuildError
from ..kernels import build
from ..torch_internals.toolchain import load_library
from . import ops

SOURCES = Path(__file__).parent

_TABLES = {
    "portable": "kNormPortable",
    "avx2": "kNormAvx2",
    "avx512": "kNormAvx512",
    "avx512_bf16": "kNormAvx512Bf16",
}
"""The C++ name of the `NormTable` of each instruction set that norms gain from."""

_MORE_FLAGS = {"avx2": ("-mf16c",)}
"""What the collectives use beside what linear layers do."""

_lock = threading.Lock()


def kernel_units() -> list[build.Unit]:
    """One unit for each instruction set of this kind of machine; none needs torch."""
    linear = {unit.name: unit for unit in build.kernel_units()}
    return [
        build.Unit(
            each.name,
            SOURCES / "norm_isa.cpp",
            (
                *each.flags,
                *_MORE_FLAGS.get(each.name, ()),
                f"-I{build.SOURCES}",
                f"-DSPLITPOINT_ISA={each.name}",
                f"-DSPLITPOINT_TABLE={_TABLES[each.name]}",
            ),
        )
        for each in build.INSTRUCTION_SETS
        if each.name in linear and each.name in _TABLES
    ]


def load() -> Path:
    """Have the operators of `ops` served by C++ where a workspace is attached; any thread may
    call it, often. Returns the library's path.

    Raises:
        KernelBuildError: when it cannot be built or loaded here; the message says what to do.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> Path:
    glue = [
        build.Unit(source.stem, source, build.torch_header_flags())
        for source in sorted(SOURCES.glob("shm_*.cpp"))
    ]
    units = [*kernel_units(), *glue]
    path = build.built("splitpoint-shm", units, [SOURCES, build.SOURCES])
    ops.register()
    try:
        load_library(path)
    except OSError as error:
        raise KernelBuildError(
            f"the C++ collectives in {path} cannot be loaded: {error}; delete the file to have "
            f"them built again"
        ) from error
    return path


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has kernels for, best first.

    Raises:
        KernelBuildError: as `load`.
    """
    load()
    names: list[str] = torch.ops.splitpoint.shm_instruction_sets()
    return names


def use_instruction_set(name: str = "best") -> None:
    """Choose the instruction set of all later calls in this process, the same on all ranks; for
    tests and measurements.

    Raises:
        ValueError: when this CPU has no instruction set of that name.
        KernelBuildError: as `load`.
    """
    load()
    torch.ops.splitpoint.shm_use_instruction_set(name)
