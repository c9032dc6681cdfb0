"""Building and caching the library: in processes of their own, with the real compiler."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

USE = """
import ctypes, os
from pathlib import Path
from splitpoint.kernels.build import Unit, built
folder = Path(os.environ["SMALL"])
path = built("small", [Unit(n, folder / f"{n}.cpp", ()) for n in ("first", "second")], [folder])
print(ctypes.CDLL(str(path)).answer())
"""
"""Builds a library of two files, as all are built; compiling the real one takes a minute."""

EXPECT_ERROR = """
from splitpoint import kernels
from splitpoint.errors import KernelBuildError
assert not kernels.available()
try:
    kernels.load()
except KernelBuildError as error:
    print(error)
"""


def start(code: str, cache: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SPLITPOINT_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | env,
    )


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def compiler(folder: Path, body: str) -> str:
    """A C++ compiler that runs a few lines of shell before, or instead of, the real one."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def small(folder: Path) -> str:
    """The folder of the sources that `USE` builds."""
    made = folder / "sources"
    made.mkdir()
    export = '__attribute__((visibility("default")))'
    made.joinpath("first.cpp").write_text(
        f'int part();\nextern "C" {export} int answer() {{ return 2 * part(); }}\n'
    )
    made.joinpath("second.cpp").write_text("int part() { return 21; }\n")
    return str(made)


REAL = f'exec {shutil.which("g++")} "$@"'


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # One appended line a call is atomic; linking is the call with -shared.
    cxx = compiler(tmp_path, f'echo "$@" >> {log}\n{REAL}')
    cache, sources = tmp_path / "cache", small(tmp_path)
    started = [start(USE, cache, CXX=cxx, SMALL=sources) for _ in range(4)]
    assert [output(process) for process in started] == ["42\n"] * 4
    calls = log.read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    assert sum("first.cpp" in call for call in calls) == 1
    folder = cache / "kernels"
    assert [path.suffix for path in sorted(folder.iterdir())] == [".lock", ".so"]

    # A later process compiles nothing.
    log.unlink()
    assert output(start(USE, cache, CXX=cxx, SMALL=sources)) == "42\n"
    assert all("--version" in call for call in log.read_text().splitlines())


def test_another_process_takes_over_when_the_builder_dies(tmp_path: Path) -> None:
    cache, began, sources = tmp_path / "cache", tmp_path / "began", small(tmp_path)
    # The first process to compile hangs; those after it do not.
    cxx = compiler(
        tmp_path,
        f'case "$*" in *-shared*) ;; *-c*) if mkdir {began} 2>/dev/null; then sleep 600; fi;; esac'
        f"\n{REAL}",
    )
    first = start(USE, cache, CXX=cxx, SMALL=sources)
    deadline = time.monotonic() + 60
    while not began.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = start(USE, cache, CXX=cxx, SMALL=sources)
    time.sleep(3)
    assert second.poll() is None, "the second did not wait for the lock"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert output(second) == "42\n"


def test_no_compiler_is_a_clear_error(tmp_path: Path) -> None:
    said = output(start(EXPECT_ERROR, tmp_path, CXX="/nowhere/g++"))
    assert "'/nowhere/g++' was not found" in said
    assert "apt-get install g++" in said
    assert "set CXX" in said


def test_no_compiler_is_a_clear_error_when_inductor_is_asked(tmp_path: Path) -> None:
    code = "import torch._inductor.config\n" + EXPECT_ERROR
    said = output(start(code, tmp_path, CXX="/nowhere/g++"))
    assert "'/nowhere/g++' was not found" in said


def test_a_failing_compiler_is_a_clear_error(tmp_path: Path) -> None:
    cxx = compiler(
        tmp_path,
        'if [ "$1" = --version ]; then echo old 1.0; exit; fi\n'
        'echo "no such option: -std=c++20" >&2\nexit 1',
    )
    cache = tmp_path / "cache"
    said = output(start(EXPECT_ERROR, cache, CXX=cxx))
    assert "failed with exit status 1" in said
    assert "no such option: -std=c++20" in said
    assert [path.suffix for path in (cache / "kernels").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    said = output(start(EXPECT_ERROR, blocked))
    assert "cannot be written" in said
    assert "SPLITPOINT_CACHE" in said


def test_a_library_that_cannot_be_loaded_is_a_clear_error(tmp_path: Path) -> None:
    # Compiles and links to a line of text.
    body = 'if [ "$1" != --version ]; then for last; do :; done; echo text > "$last"; fi'
    said = output(start(EXPECT_ERROR, tmp_path, CXX=compiler(tmp_path, body)))
    assert "cannot be loaded" in said
    assert "delete the file" in said


def test_a_cache_that_others_may_write_is_a_clear_error(tmp_path: Path) -> None:
    cache = tmp_path / "open" / "cache"
    assert output(start(USE, cache, SMALL=small(tmp_path))) == "42\n"
    cache.parent.chmod(0o777)
    said = output(start(EXPECT_ERROR, cache))
    assert f"{cache.parent} may be written by others" in said
    assert f"chmod go-w {cache.parent}" in said


def test_a_library_that_others_may_write_is_built_again(tmp_path: Path) -> None:
    cache, sources = tmp_path / "cache", small(tmp_path)
    log = tmp_path / "log"
    umasked = "import os; os.umask(0o002)\n" + USE
    cxx = compiler(tmp_path, f'echo "$@" >> {log}\n{REAL}')
    assert output(start(umasked, cache, SMALL=sources, CXX=cxx)) == "42\n"
    (library,) = (cache / "kernels").glob("*.so")
    assert library.stat().st_mode & 0o777 == 0o755
    library.chmod(0o775)
    assert output(start(USE, cache, SMALL=sources, CXX=cxx)) == "42\n"
    assert log.read_text().count("-shared") == 2
    library.rename(tmp_path / "moved")
    library.symlink_to(tmp_path / "moved")
    assert output(start(USE, cache, SMALL=sources, CXX=cxx)) == "42\n"
    assert log.read_text().count("-shared") == 3
