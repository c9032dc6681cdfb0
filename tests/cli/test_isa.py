"""`--isa avx2`: all that is measured goes without AVX-512."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


@pytest.mark.slow
@pytest.mark.processes
def test_all_of_a_comparison_is_measured_with_avx2_alone(tmp_path: Path) -> None:
    folder, told = tiny.save(tmp_path / "tiny"), tmp_path / "out.json"
    command = [sys.executable, "-m", "splitpoint", "bench", "forward", str(folder), "--isa", "avx2"]
    command += ["--sizes", "2", "--max-size", "2", "--seconds", "0.05", "--json", str(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(AVX2)" in done.stdout
    assert json.loads(told.read_text())["environment"]["cpu_capability"] == "AVX2"
