"""Let Inductor put what g++ makes in its cache whole or not at all.

Inductor lets g++ write to a library's final name and takes whatever is there as made. A compile
that is killed leaves an empty or half a file there, in a cache that all programs of a user share:
every later compile of the same kernel then fails to load it ("file too short"), or crashes. What
is compiled here gets its name when it is whole, and what others left half is compiled anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .probe import fits

log = logging.getLogger("splitpoint")

_ELF64 = struct.Struct("<4sBB34xQ10xHH2x")
"""Of an ELF file's header: magic, class, byte order, where the section headers are (they are the
last part), how long one is, and how many there are."""


def is_whole(path: Path) -> bool:
    """Whether a compiler finished a file. Other than 64-bit little-endian ELF (precompiled
    headers, which g++ checks itself), files only have to have something in them."""
    try:
        with path.open("rb") as file:
            head = file.read(_ELF64.size)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if path.suffix not in (".so", ".o"):
        return size > 0
    if len(head) < _ELF64.size:
        return False
    magic, bits, order, sections, each, count = _ELF64.unpack(head)
    if magic != b"\x7fELF":
        return False
    return (bits, order) != (2, 1) or 0 < sections + each * count <= size


def _build_aside(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """`CppBuilder.build` by way of a temporary file."""

    def build(builder: Any) -> None:
        target, output = builder.get_target_file_path(), builder._output
        temporary = f"{target}.{os.getpid()}-{os.urandom(4).hex()}"
        if not output.endswith(target) or builder._use_relative_path:
            return original(builder)
        builder._output = output.removesuffix(target) + temporary
        try:
            original(builder)
            os.replace(temporary, target)
        finally:
            builder._output = output
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    return build


def _compile_anew(original: Callable[..., None]) -> Callable[..., None]:
    """`_worker_compile_cpp`, which leaves alone what is there, for files that are whole."""

    def compile_missing(lock_path: str, builders: Sequence[Any]) -> None:
        from torch._inductor.codecache import LOCK_TIMEOUT
        from torch.utils._filelock import FileLock

        paths = [Path(builder.get_target_file_path()) for builder in builders]
        if any(path.exists() and not is_whole(path) for path in paths):
            with FileLock(lock_path, timeout=LOCK_TIMEOUT):  # nobody is writing to them now
                for path in paths:
                    if path.exists() and not is_whole(path):
                        log.warning("%s was left half by a compile that died: made anew", path)
                        path.unlink()
        original(lock_path, builders)

    return compile_missing


@contextlib.contextmanager
def whole_files() -> Iterator[None]:
    """Inside, files that Inductor has compiled appear whole, and half ones count as missing."""
    if not fits("whole files"):
        yield
        return
    from torch._inductor import codecache
    from torch._inductor.cpp_builder import CppBuilder

    with (
        patch.object(CppBuilder, "build", _build_aside(CppBuilder.build)),
        patch.object(
            codecache, "_worker_compile_cpp", _compile_anew(codecache._worker_compile_cpp)
        ),
    ):
        yield
