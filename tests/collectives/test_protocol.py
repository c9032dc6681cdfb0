"""The ranks' meeting under ThreadSanitizer: the library's own headers, with threads as ranks.

It covers the order of every access to slots, flags, signatures and descriptions in one-shot and
two-shot calls of many chunks, mixed at random, past the place where the chunks' numbers start
again, with all ways of waiting. It does not cover stores past the caches (they have a fence of
their own, and tests of values), nor deaths.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from splitpoint.collectives import shm
from splitpoint.torch_internals.toolchain import cpp_compiler

pytestmark = [pytest.mark.slow, pytest.mark.processes]

FLAGS = ("-std=c++20", "-O1", "-g", "-fsanitize=thread")


def run(folder: Path, ranks: int, calls: int, **changes: str) -> subprocess.CompletedProcess[str]:
    """Build the model over a copy of the headers, with changes to their text, and run it."""
    for header in shm.SOURCES.glob("*.h"):
        shutil.copy(header, folder)
    protocol = folder / "shm_protocol.h"
    for old, new in changes.items():
        text = protocol.read_text()
        assert f"{old} = 4" in text
        protocol.write_text(text.replace(f"{old} = 4", f"{old} = {new}"))
    compiler = cpp_compiler()
    assert compiler is not None
    source, program = Path(__file__).with_name("protocol.cpp"), folder / "protocol"
    subprocess.run([compiler, *FLAGS, f"-I{folder}", source, "-o", program], check=True)
    return subprocess.run(
        [program, str(ranks), str(calls)], capture_output=True, text=True, check=False, timeout=200
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_race_and_no_wrong_value(tmp_path: Path, ranks: int) -> None:
    done = run(tmp_path, ranks, 1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{ranks} ranks, 1500 calls, 0 wrong values\n"
    assert "WARNING" not in done.stderr


def test_fewer_slots_would_race(tmp_path: Path) -> None:
    """That the check above can fail: with one slot less there are races, which it reports."""
    done = run(tmp_path, 2, 1500, kSlots="3")
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
