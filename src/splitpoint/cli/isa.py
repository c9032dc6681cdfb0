"""Measuring as if the CPU had fewer instruction sets than it has."""

from __future__ import annotations

import os
import sys

from ..kernels import use_instruction_set
from ..torch_internals.instruction_sets import AVX2_VARIABLES, answer_as_avx2


def as_if_avx2() -> None:
    """Have torch, its libraries, Inductor and this package go without AVX-512 and AMX for the rest
    of the process. The libraries read their environment when they are loaded, so the process begins
    anew with it.

    Raises:
        UnsupportedTorch: when this version of torch is asked for instruction sets by other names.
    """
    if any(os.environ.get(name) != value for name, value in AVX2_VARIABLES.items()):
        sys.stdout.flush()
        sys.stderr.flush()
        arguments = [sys.executable, "-m", "splitpoint", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **AVX2_VARIABLES})
    answer_as_avx2()
    use_instruction_set("avx2")
