"""Programs and libraries under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from splitpoint.kernels.build import COMMON_FLAGS, Unit
from splitpoint.torch_internals.toolchain import cpp_compiler

FLAGS = (
    # A null pointer is the address sanitizer's too; vptr asks about classes that are torch's.
    *("-fsanitize=address,undefined", "-fno-sanitize=null,vptr", "-fno-sanitize-recover=all"),
    # Line numbers only: all of the debugger's information takes a third of the compilation.
    *("-O1", "-g1"),
)

OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def build(units: Sequence[Unit], target: Path, *link: str) -> None:
    """Compile and link C++ files, two at a time."""
    compiler = cpp_compiler()
    assert compiler is not None

    def compile_unit(unit: Unit) -> str:
        made = target.parent / f"{unit.name}.o"
        flags = [*COMMON_FLAGS, *FLAGS, *unit.flags]
        subprocess.run([compiler, *flags, "-c", unit.source, "-o", made], check=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    subprocess.run([compiler, *FLAGS, *objects, *link, "-o", target], check=True)


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run something that was built so, and show what it says if it fails."""
    variables: Mapping[str, str] = os.environ | OPTIONS | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done


def preload() -> str:
    """What has to be loaded before a program that was not built so: the sanitizer, and the library
    whose exceptions it looks after."""
    compiler = cpp_compiler()
    assert compiler is not None
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return " ".join(found)
