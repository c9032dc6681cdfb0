"""Build the C++ kernels once per machine, and find them again.

The library's name holds a SHA-256 of everything that decides what is in it, so a library that
is there is the right one: it is built in a folder of its own and renamed into place when it is
whole. Processes that start together wait on a lock for the one that builds; a lock is given up
by the operating system when its holder dies, so the next one takes over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import KernelBuildError, UntrustedStore
from ..paths import cache_folder, foreign, trusted_path
from ..torch_internals.toolchain import (
    CXX11_ABI,
    TORCH_VERSION,
    cpp_compiler,
    include_folders,
    library_folder,
)

SOURCES = Path(__file__).parent
RUNTIME_SOURCES = SOURCES.parent / "runtime" / "cpp"
"""What runs and checks a range is built into the same library: it calls the kernels directly."""

COMMON_FLAGS = (
    "-O2",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    # Contract a * b + c to one rounding, which strict ISO modes leave off.
    "-ffp-contract=fast",
    "-fno-math-errno",
)

AVX512_FLAGS = ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
AVX512_BF16_FLAGS = (*AVX512_FLAGS, "-mavx512bf16")
AMX_FLAGS = (*AVX512_BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8")


@dataclass(frozen=True)
class InstructionSet:
    """One set of CPU instructions that the kernels are compiled for."""

    name: str
    table: str
    """The C++ name of its `KernelTable`."""
    flags: tuple[str, ...]
    machines: tuple[str, ...] | None
    """`platform.machine()` values that have it; None for all."""


INSTRUCTION_SETS = (
    InstructionSet("portable", "kPortable", (), None),
    InstructionSet("avx2", "kAvx2", ("-mavx2", "-mfma"), ("x86_64",)),
    InstructionSet("avx2_vnni", "kAvx2Vnni", ("-mavx2", "-mfma", "-mavxvnni"), ("x86_64",)),
    InstructionSet("avx512", "kAvx512", AVX512_FLAGS, ("x86_64",)),
    InstructionSet("avx512_vnni", "kAvx512Vnni", (*AVX512_FLAGS, "-mavx512vnni"), ("x86_64",)),
    InstructionSet("avx512_bf16", "kAvx512Bf16", AVX512_BF16_FLAGS, ("x86_64",)),
    InstructionSet("amx", "kAmx", AMX_FLAGS, ("x86_64",)),
)


@dataclass(frozen=True)
class Unit:
    """One C++ file and the flags it is compiled with."""

    name: str
    source: Path
    flags: tuple[str, ...]


def kernel_units() -> list[Unit]:
    """One unit for each instruction set of this kind of machine; none needs torch."""
    return [
        Unit(
            each.name,
            SOURCES / "isa.cpp",
            (*each.flags, f"-DSPLITPOINT_ISA={each.name}", f"-DSPLITPOINT_TABLE={each.table}"),
        )
        for each in INSTRUCTION_SETS
        if each.machines is None or platform.machine() in each.machines
    ]


def library() -> Path:
    """The path of the library of this folder's operators, built first if this machine has none.

    Raises:
        KernelBuildError: as `built`.
    """
    return built("splitpoint", library_units(), [SOURCES, RUNTIME_SOURCES])


def library_units() -> list[Unit]:
    """All units of the library of this folder's operators."""
    torch_headers = torch_header_flags()
    return [
        *kernel_units(),
        Unit("machine", SOURCES / "machine.cpp", torch_headers),
        Unit("glue", SOURCES / "linear.cpp", torch_headers),
        Unit("attention", SOURCES / "attention.cpp", torch_headers),
        Unit("cached_attention", SOURCES / "cached_attention.cpp", torch_headers),
        *(
            Unit(
                name,
                RUNTIME_SOURCES / f"{name}.cpp",
                (*torch_headers, *_python_headers(), f"-I{SOURCES}"),
            )
            for name in ("watch", "runner")
        ),
    ]


def torch_header_flags() -> tuple[str, ...]:
    """The flags of a unit that includes torch's headers."""
    return tuple(_isystem(include_folders()))


def place() -> Path:
    """Where the library of this folder's operators is, or will be built.

    Raises:
        KernelBuildError: when there is no compiler for it here.
    """
    return _place("splitpoint", _compiler(), library_units(), [SOURCES, RUNTIME_SOURCES])


def _place(name: str, compiler: str, units: Sequence[Unit], folders: Sequence[Path]) -> Path:
    return cache_folder() / "kernels" / f"{name}-{_key(compiler, units, folders)}.so"


def built(name: str, units: Sequence[Unit], folders: Sequence[Path]) -> Path:
    """The path of a shared library of some units, built first if this machine has none.

    All C++ files in `folders` count as its sources: it is built again when any changes.

    Raises:
        KernelBuildError: when there is no compiler, it fails, or the cache folder cannot be
            written or can by others; the message says which and what to do.
    """
    compiler = _compiler()
    path = _place(name, compiler, units, folders)
    try:
        trusted_path(path.parent, "the folder of the C++ kernels", make=0o755)
        if not _is_there(path):
            with _locked(path.with_suffix(".lock")):
                if not _is_there(path):
                    _build(compiler, units, path)
    except UntrustedStore as error:
        raise KernelBuildError(str(error)) from error
    except OSError as error:
        raise KernelBuildError(
            f"the C++ kernels cannot be written to {path.parent}: {error}; set SPLITPOINT_CACHE "
            f"to a folder that can be written"
        ) from error
    return path


def _is_there(path: Path) -> bool:
    """Whether there is a library that nobody else can have written, and no link to one."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and not foreign(found)


def _compiler() -> str:
    if sys.platform != "linux":
        raise KernelBuildError(
            f"the C++ kernels are built on Linux only, and this is {sys.platform}: models are "
            f"compiled with Inductor's own kernels"
        )
    compiler = cpp_compiler()
    if compiler is None:
        raise KernelBuildError(
            f"the C++ kernels need a C++ compiler, and {os.environ.get('CXX', 'g++')!r} was not "
            f"found: install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf install "
            f"gcc-c++) or set CXX to its path"
        )
    return compiler


def _python_headers() -> Iterator[str]:
    """Flags for what reads Python's objects: without Python's headers it is built to say that
    it cannot (the watch), or is left out (the runner)."""
    folder = Path(sysconfig.get_paths()["include"])
    if (folder / "Python.h").exists():
        yield from ("-DSPLITPOINT_PYTHON", "-isystem", str(folder))


def _isystem(folders: Sequence[Path]) -> Iterator[str]:
    for folder in folders:
        yield from ("-isystem", str(folder))


def _key(compiler: str, units: Sequence[Unit], folders: Sequence[Path]) -> str:
    """24 hexadecimal digits of a SHA-256 of the sources, flags, compiler, Python and torch."""
    digest = hashlib.sha256()
    parts = [
        _run([compiler, "--version"]),
        TORCH_VERSION,
        str(CXX11_ABI),
        platform.machine(),
        platform.python_version(),
        *COMMON_FLAGS,
    ]
    for unit in units:
        parts += [unit.name, *unit.flags]
    for folder in folders:
        for source in sorted([*folder.glob("*.h"), *folder.glob("*.cpp")]):
            parts += [source.name, source.read_text()]
    for part in parts:
        data = part.encode()
        # The length keeps "ab", "c" apart from "a", "bc".
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


def _build(compiler: str, units: Sequence[Unit], path: Path) -> None:
    """Compile the units, link them and move the library to `path` in one step."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as name:
        folder = Path(name)
        objects = [folder / f"{unit.name}.o" for unit in units]

        def compile_unit(unit: Unit, target: Path) -> None:
            source = str(unit.source)
            _run([compiler, *COMMON_FLAGS, *unit.flags, "-c", source, "-o", str(target)])

        # The compilers are processes of their own: threads only wait for them.
        workers = min(len(units), len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compile_unit, units, objects))
        whole = folder / path.name
        libraries = ["-L", str(library_folder()), "-ltorch_cpu", "-lc10"]
        libraries += ["-Wl,--as-needed", "-ltorch_python"]  # the runner alone needs that one
        _run([compiler, "-shared", *map(str, objects), *libraries, "-o", str(whole)])
        # On disk before it has its name: after a power cut a library that is there is whole.
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.chmod(whole.stat().st_mode & ~0o022)  # whatever the umask says
        whole.replace(path)


def _run(command: Sequence[str]) -> str:
    """What a compiler prints.

    Raises:
        KernelBuildError: when it fails, with the command and the end of its messages.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelBuildError(
            f"{command[0]} failed with exit status {done.returncode} on the C++ kernels; they need "
            f"C++20 (GCC 12 or clang 15 or later): install a newer one and set CXX to its "
            f"path.\n{' '.join(command)}\n{done.stderr[-4000:]}"
        )
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it; it falls when the process ends."""
    import fcntl

    # The file is left behind: removing it would let two processes lock two files of one name.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
