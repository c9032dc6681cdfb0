"""Let Inductor ask cheaply whether the C++ compiler knows a vector instruction set.

Before its first kernel Inductor compiles and loads a file with all of ATen's vector headers for
each instruction set of the CPU: 6 to 7 CPU seconds where there is AVX-512. What it asks is
whether compiler and assembler take the flags; an empty function and one instruction of each
extension answer that in 20 ms a set. Whether the CPU has them Inductor finds out before, and
apart from this.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from .probe import fits, require

INSTRUCTIONS = {
    "-mavx2": "vpaddd %ymm0, %ymm0, %ymm0",
    "-mfma": "vfmadd213ps %ymm0, %ymm0, %ymm0",
    "-mf16c": "vcvtph2ps %xmm0, %ymm0",
    "-mavx512f": "vaddps %zmm0, %zmm0, %zmm0",
    "-mavx512dq": "vpmullq %zmm0, %zmm0, %zmm0",
    "-mavx512vl": "vaddps %ymm16, %ymm16, %ymm16",
    "-mavx512bw": "vpaddw %zmm0, %zmm0, %zmm0",
    "-mavx512bf16": "vcvtne2ps2bf16 %zmm0, %zmm0, %zmm0",
    "-mavx512vnni": "vpdpbusd %zmm0, %zmm0, %zmm0",
    "-mamx-tile": "tilezero %tmm0",
    "-mamx-bf16": "tdpbf16ps %tmm0, %tmm1, %tmm2",
    "-mamx-int8": "tdpbusd %tmm0, %tmm1, %tmm2",
    "-mamx-fp16": "tdpfp16ps %tmm0, %tmm1, %tmm2",
}
"""An instruction of each extension by the compiler's flag for it."""


def takes(compiler: str, flags: list[str]) -> bool:
    """Whether a compiler and its assembler take flags of `INSTRUCTIONS`."""
    body = "".join(f'asm volatile("{INSTRUCTIONS[flag]}");' for flag in flags)
    done = subprocess.run(
        [compiler, *flags, "-x", "c++", "-c", "-o", "/dev/null", "-"],
        input=f"void probe() {{ {body} }}\n",
        text=True,
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def _check(fallback: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
    def check_build(isa: Any, code: str) -> bool:
        from torch._inductor.cpp_builder import get_cpp_compiler

        flags = isa.build_arch_flags().split()
        if sys.platform != "linux" or not flags or not set(flags) <= INSTRUCTIONS.keys():
            return fallback(isa, code)
        return takes(get_cpp_compiler(), flags)

    return check_build


@contextlib.contextmanager
def quick_isa_checks() -> Iterator[None]:
    """Inside, an instruction set that Inductor has not asked about yet is asked about cheaply.

    The answers are Inductor's own to keep, for this process.
    """
    if not fits("quick checks of instruction sets"):
        yield
        return
    from torch._inductor.cpu_vec_isa import VecISA

    with patch.object(VecISA, "check_build", _check(VecISA.check_build)):
        yield


AVX2_VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""The environment of a process in which torch's own kernels, oneDNN's and MKL's are those of AVX2.
"""


def answer_as_avx2() -> None:
    """Have torch tell those who ask, for the rest of this process, that the CPU has neither AVX-512
    nor AMX; for measurements.

    Raises:
        UnsupportedTorch: when this version of torch is asked by other names.
    """
    require("instruction sets of the CPU")
    for name in ("avx512", "avx512_bf16", "amx_tile", "amx_fp16"):
        setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
