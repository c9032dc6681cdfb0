"""The runner and the watch under the address and undefined-behaviour sanitizers: their own tests,
malformed programs included, with a library that was built so."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from splitpoint.kernels import build
from splitpoint.torch_internals.toolchain import library_folder
from tests import sanitizers

ROOT = Path(__file__).parents[2]

TESTS = (
    *("tests/compilers/test_native_steps.py", "tests/runtime/test_malformed.py"),
    *("tests/capture/test_watch.py", "-k", "not every_guard"),
)


@pytest.mark.slow
@pytest.mark.processes
def test_runner_and_watch_touch_only_what_is_theirs(tmp_path: Path) -> None:
    units = [
        # Without optimisation: what it runs is short, and most of it is templates to compile.
        replace(unit, flags=(*unit.flags, "-O0"))
        for unit in build.library_units()
        if unit.name in ("runner", "watch")
    ]
    if not any("-DSPLITPOINT_PYTHON" in unit.flags for unit in units):
        pytest.skip("the runner needs Python's headers")
    stub = Path(__file__).with_name("no_linear.cpp")
    flags = (*build.torch_header_flags(), f"-I{build.SOURCES}", "-O0")
    units.append(build.Unit("no_linear", stub, flags))
    library = tmp_path / "sanitized.so"
    sanitizers.build(units, library, "-shared", f"-L{library_folder()}", "-ltorch_python")
    done = sanitizers.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"),
            *("-p", "tests.runtime.sanitized", f"--rootdir={ROOT}", *_paths()),
        ],
        LD_PRELOAD=sanitizers.preload(),
        SANITIZED=str(library),
        # So that Python's own objects are guarded, too.
        PYTHONMALLOC="malloc",
        PYTHONPATH=":".join([str(ROOT), str(ROOT / "src")]),
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 60
    assert "skipped" not in done.stdout


def _paths() -> list[str]:
    return [str(ROOT / each) if each.endswith(".py") else each for each in TESTS]
