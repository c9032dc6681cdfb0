"""What an interrupted g++ leaves in Inductor's cache is compiled anew, and ours leaves nothing."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitpoint.torch_internals.cpp_files import is_whole, whole_files
from splitpoint.torch_internals.instruction_sets import quick_isa_checks

COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="needs a C++ compiler"
)

KERNEL = '#include <cstdint>\nextern "C" void kernel(int64_t given) { if (given < 0) throw given; }'


def kernel() -> Callable[..., Any]:
    """A kernel as Inductor compiles and loads one: whatever there is of it in its cache."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    CppPythonBindingsCodeCache.cache_clear()
    with quick_isa_checks(), whole_files():
        made: Callable[..., Any] = CppPythonBindingsCodeCache.load_pybinding(["int64_t"], KERNEL)
        return made


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library of `kernel` in a cache of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    kernel()(1)
    (found,) = tmp_path.rglob("*.so")
    return found


def test_half_a_library_is_none(library: Path, tmp_path: Path) -> None:
    whole = library.read_bytes()
    path = tmp_path / "some.so"
    path.write_bytes(whole)
    assert is_whole(path)
    for cut in (0, 1, 63, 64, 4096, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert not is_whole(path), cut
    path.write_bytes(bytes(len(whole)))
    assert not is_whole(path)
    path.unlink()
    assert not is_whole(path)


@pytest.mark.parametrize("left", ["nothing", "half", "zeros"])
def test_what_an_interrupted_compile_left_is_made_anew(
    library: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes({"nothing": b"", "half": data[: len(data) // 2]}.get(left, bytes(100)))
    with caplog.at_level(logging.WARNING, "splitpoint"):
        kernel()(1)
    assert "made anew" in caplog.text
    assert library.read_bytes() == data
    caplog.clear()
    kernel()(1)
    assert not caplog.text


def test_a_compile_that_is_killed_leaves_no_library(tmp_path: Path) -> None:
    """The compiler writes half a file and then kills its process group."""
    compiler, cache = tmp_path / "g++", tmp_path / "cache"
    compiler.write_text(
        f"""#!{sys.executable} -S
import os, signal, sys
if "-shared" not in sys.argv:
    os.execv({COMPILER!r}, [{COMPILER!r}, *sys.argv[1:]])
with open(sys.argv[sys.argv.index("-o") + 1], "wb") as file:
    file.write(b"half")
os.killpg(0, signal.SIGKILL)
"""
    )
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", "from tests.torch_internals.test_cpp_files import kernel\nkernel()"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "CXX": str(compiler)},
        cwd=Path(__file__).parents[2],
        check=False,
        start_new_session=True,
    )
    assert done.returncode == -signal.SIGKILL
    assert list(cache.rglob("*.cpp"))
    assert list(cache.rglob("*.so")) == []
    assert [path.read_bytes() for path in cache.rglob("*.so.*")] == [b"half"]
