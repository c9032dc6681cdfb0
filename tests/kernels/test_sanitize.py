"""The kernels alone, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpoint import kernels
from splitpoint.kernels import build
from tests import sanitizers


@pytest.mark.slow
@pytest.mark.processes
def test_kernels_stay_within_their_buffers(tmp_path: Path) -> None:
    drivers = [
        build.Unit(name, Path(__file__).with_name(f"{name}.cpp"), (f"-I{build.SOURCES}",))
        for name in ("sanitize", "sanitize_attention", "sanitize_cached", "sanitize_int8")
    ]
    program = tmp_path / "sanitize"
    sanitizers.build([*build.kernel_units(), *drivers], program)
    *names, runs = sanitizers.run([program]).stdout.splitlines()
    assert sorted(names) == sorted(kernels.instruction_sets())
    assert int(runs.split()[0]) > 2500
