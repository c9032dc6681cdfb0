"""The C++ kernels of several graphs, built as one library.

Inductor builds each kernel as a library of its own, and each of these builds first reads the same
headers: that takes longer than most kernels do, precompiled (which takes longer still, once) or
not. Here kernels wait until all of them are written, and are built in one run of the compiler.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .generated_code import kernel_place as place_of_function
from .generated_code import load_kernel
from .probe import fits

_PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(?!pragma\b).*$", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b.*$", re.MULTILINE)

BUILDS_BEFORE_PRECOMPILED_HEADERS = 5
"""Reading the headers takes 1.5 CPU s, making precompiled ones 5.7, reading those 0.4."""

KERNELS_A_FILE = 16
"""Most kernels in a file. More would save CPU time, but a compiler inlines less in a large file;
12 kernels of a model were seen to come out as those built one by one."""


class BuildFailed(Exception):
    """The C++ compiler refused a kernel; says what it said."""


@dataclass(eq=False)
class Kernel:
    """A kernel that Inductor wrote; it may have to be built yet. Stands for its function."""

    argument_types: tuple[str, ...]
    """In C++."""
    source: str
    """C++ with a function `kernel`."""
    function: Callable[..., Any] | None = None
    """What `build` made of it."""
    _wanted: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def __call__(self, *args: Any) -> Any:
        """Call the function; builds it first where that was not done."""
        return self.built()(*args)

    def put(self, names: dict[str, Any], name: str) -> None:
        """Have `names[name]` be the function, once there is one."""
        if self.function is None:
            self._wanted.append((names, name))
        else:
            names[name] = self.function

    def built(self) -> Callable[..., Any]:
        """The function; builds it first where that was not done."""
        if self.function is None:
            build([self])
        assert self.function is not None
        return self.function

    def set(self, function: Callable[..., Any]) -> None:
        """Have it built."""
        self.function = function
        for names, name in self._wanted:
            names[name] = function
        self._wanted.clear()

    @property
    def symbol(self) -> str:
        """The function's name in a library of several."""
        told = "\n".join([*self.argument_types, self.source])
        return f"kernel_{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    @property
    def can_join(self) -> bool:
        """Whether it can be in one file with others: apart from pragmas the preprocessor is
        asked for nothing but the one header of all."""
        return all(line.strip() == _PREFIX for line in _DIRECTIVE.findall(self.source))


def kernel_place(kernel: Callable[..., Any]) -> tuple[str, str]:
    """The path of the shared library that a C++ kernel comes from, and its name there; builds it
    first where that was not done."""
    return place_of_function(kernel.built() if isinstance(kernel, Kernel) else kernel)


@contextlib.contextmanager
def waiting_kernels() -> Iterator[list[Kernel]]:
    """Inside, Inductor's kernels are not built, but are `Kernel`s; yields them as they come."""
    if not fits("kernels in one file"):
        yield []
        return
    from torch._inductor.async_compile import AsyncCompile

    found: list[Kernel] = []

    def cpp_pybinding(_: Any, argtypes: Sequence[str], source_code: str) -> Kernel:
        found.append(Kernel(tuple(argtypes), source_code))
        return found[-1]

    with patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding):
        yield found


def build(kernels: Sequence[Kernel], workers: int | None = None) -> None:
    """Build kernels, those that can be in one file together; equal ones once.

    Args:
        kernels: those that are built already stay as they are.
        workers: how many compilers may run at once, and how many files there are at least; None
            for as many as Inductor would have, over no more files than there must be.

    Raises:
        BuildFailed: when the compiler fails; no telling whose fault it is if there are several.
    """
    waiting: dict[tuple[tuple[str, ...], str], list[Kernel]] = {}
    for kernel in kernels:
        if kernel.function is None:
            waiting.setdefault((kernel.argument_types, kernel.source), []).append(kernel)
    if not waiting:
        return
    first = [equal[0] for equal in waiting.values()]
    joined = [kernel for kernel in first if kernel.can_join]
    files = [
        ({each.symbol: each for each in part}, _file(part)) for part in _parts(joined, workers)
    ]
    files += [
        ({"kernel": kernel}, kernel.source + _bindings(kernel, "kernel"))
        for kernel in first
        if not kernel.can_join
    ]
    with _own_error(), ThreadPoolExecutor(workers or _cores()) as pool:
        # All are begun before the first is waited for.
        libraries = [_library(source, pool.submit) for _, source in files]
        for (named, _), library in zip(files, libraries, strict=True):
            _load(library(), named)
    for kernel, *others in waiting.values():
        for other in others:
            assert kernel.function is not None
            other.set(kernel.function)


def _parts(kernels: Sequence[Kernel], workers: int | None) -> list[list[Kernel]]:
    """The kernels of each file, which take about as long: in turn, the longest first."""
    count = max(math.ceil(len(kernels) / KERNELS_A_FILE), min(workers or 1, len(kernels)))
    ordered = sorted(kernels, key=lambda kernel: (-len(kernel.source), kernel.symbol))
    return [ordered[first::count] for first in range(count)]


def _cores() -> int:
    from torch._inductor import config

    return max(1, config.compile_threads or 1)


def _load(library: Path, kernels: Mapping[str, Kernel]) -> None:
    """Have kernels built, by their names in a library."""
    for name, kernel in kernels.items():
        kernel.set(load_kernel(library, library.name.partition(".")[0], name))


def _file(kernels: Sequence[Kernel]) -> str:
    """One C++ file with all kernels, each with Inductor's own bindings to Python."""
    parts = [_bindings(kernel, kernel.symbol) for kernel in kernels]
    includes = dict.fromkeys(
        line.strip() for part in parts for line in _INCLUDE.findall(part) if "Python.h" not in line
    )
    lines = ["#define PY_SSIZE_T_CLEAN", "#include <Python.h>", _PREFIX, *includes]
    for kernel, bindings in zip(kernels, parts, strict=True):
        lines += [
            f"namespace of_{kernel.symbol} {{",
            f"#define kernel {kernel.symbol}",
            _INCLUDE.sub("", kernel.source),
            "#undef kernel",
            _INCLUDE.sub("", bindings),
            "}",
        ]
    return "\n".join(lines) + "\n"


def _bindings(kernel: Kernel, name: str) -> str:
    """What Inductor writes for Python to call a kernel of this name."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    taken = ", ".join(
        f"parse_arg<{each.replace('const ', '')}>(args, {index})"
        for index, each in enumerate(kernel.argument_types)
    )
    return CppPythonBindingsCodeCache.suffix_template.format(
        arg_len=len(kernel.argument_types),
        call_entry_func=f"{name}({taken}); Py_RETURN_NONE;",
        entry_func=name,
        extra_parse_arg="",
    )


def _library(source: str, submit: Callable[..., Any]) -> Callable[[], Path]:
    """Begin to build one file as Inductor builds that of a kernel, unless its cache has it; what
    is returned waits for the library. `submit` is an executor's."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    precompiled = _precompiled_headers_pay()

    class Cache(CppPythonBindingsCodeCache):
        cache: dict[str, Any] = {}  # noqa: RUF012  as the base has it

        @staticmethod
        def _load_library_inner(path: str, key: str) -> Any:
            return types.SimpleNamespace(path=path)

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str | None:
            header: str | None = super()._get_uncompiled_header(device)
            return header if precompiled else None

    wait = Cache.load_async(source, "cpu", submit_fn=submit)
    return lambda: Path(wait().path)


def _precompiled_headers_pay() -> bool:
    """Whether to build with the precompiled headers that Inductor makes once a machine: where it
    has made some, or this process has read the headers so often that making them costs no more."""
    from torch._inductor.codecache import _HEADER_DIR

    made = next(Path(_HEADER_DIR).glob("*.gch"), None) is not None
    return made or next(_builds()) >= BUILDS_BEFORE_PRECOMPILED_HEADERS


@functools.cache
def _builds() -> Iterator[int]:
    """Counts the builds of this process."""
    return itertools.count()


@contextlib.contextmanager
def _own_error() -> Iterator[None]:
    from torch._inductor.exc import CppCompileError

    try:
        yield
    except CppCompileError as error:
        raise BuildFailed(str(error)) from error
