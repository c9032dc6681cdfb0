"""The kernels alone, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpoint.collectives import shm
from splitpoint.kernels import build
from tests import sanitizers


@pytest.mark.slow
@pytest.mark.processes
def test_kernels_stay_within_their_buffers(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("sanitize.cpp")
    program = tmp_path / "sanitize"
    sanitizers.build(
        [*shm.kernel_units(), build.Unit("driver", driver, (f"-I{shm.SOURCES}",))], program
    )
    *names, runs = sanitizers.run([program], ASAN_OPTIONS="").stdout.splitlines()
    assert sorted(names) == sorted(shm.instruction_sets())
    assert int(runs.split()[0]) > 1000
