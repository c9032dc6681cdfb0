"""The kernels alone, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splitpoint import _torch, kernels
from splitpoint.kernels import build

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")


@pytest.mark.slow
@pytest.mark.processes
def test_kernels_stay_within_their_buffers(tmp_path: Path) -> None:
    compiler = _torch.cpp_compiler()
    assert compiler is not None
    units = [
        *build.kernel_units(),
        *(
            build.Unit(name, Path(__file__).with_name(f"{name}.cpp"), (f"-I{build.SOURCES}",))
            for name in ("sanitize", "sanitize_attention")
        ),
    ]

    def compile_unit(unit: build.Unit) -> str:
        target = tmp_path / f"{unit.name}.o"
        flags = [*build.COMMON_FLAGS, *SANITIZERS, *unit.flags]
        subprocess.run([compiler, *flags, "-c", unit.source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    program = tmp_path / "sanitize"
    subprocess.run([compiler, *SANITIZERS, *objects, "-o", program], check=True)
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        [program], capture_output=True, text=True, check=False, env=os.environ | options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *names, runs = done.stdout.splitlines()
    assert sorted(names) == sorted(kernels.instruction_sets())
    assert int(runs.split()[0]) > 2500
