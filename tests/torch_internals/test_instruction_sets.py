"""The cheap question about instruction sets has the answer of Inductor's own, dear one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitpoint.torch_internals import instruction_sets as isa

ASK = """
import contextlib, sys
from torch._inductor.cpu_vec_isa import pick_vec_isa, valid_vec_isa_list
from splitpoint.torch_internals.instruction_sets import quick_isa_checks
with quick_isa_checks() if sys.argv[1] == "quick" else contextlib.nullcontext():
    print([(str(isa), isa.build_arch_flags()) for isa in valid_vec_isa_list()], pick_vec_isa())
"""


def ask(way: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, way],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def compiler_without(folder: Path, flag: str) -> str:
    """A C++ compiler that does not know a flag."""
    script = folder / "g++-old"
    script.write_text(
        f'#!/bin/sh\nfor each; do [ "$each" = {flag} ] && exit 1; done\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_the_answer_is_inductors_own(tmp_path):
    assert ask("quick", tmp_path) == ask("own", tmp_path)


def test_a_flag_that_the_compiler_does_not_know_is_noticed(tmp_path):
    everything = ask("quick", tmp_path)
    if "-mavx512vnni" not in everything:
        pytest.skip("this CPU has no AVX-512 VNNI")
    old = compiler_without(tmp_path, "-mavx512vnni")
    without = ask("quick", tmp_path, CXX=old)
    assert without != everything
    assert without == ask("own", tmp_path, CXX=old)


def test_nothing_is_built_with_atens_headers(tmp_path):
    ask("quick", tmp_path)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("flag", isa.INSTRUCTIONS)
def test_an_instruction_is_of_its_extension(flag, tmp_path):
    if not isa.takes("g++", []) or "x86_64" not in os.uname().machine:
        pytest.skip("no g++ for x86-64")
    if not isa.takes("g++", [flag]):
        pytest.skip(f"this g++ or its assembler does not know {flag}")
    assert not isa.takes(compiler_without(tmp_path, flag), [flag])


def test_torch_may_answer_as_if_there_were_avx2_alone() -> None:
    code = """if True:
        import torch
        from splitpoint.torch_internals.instruction_sets import answer_as_avx2
        answer_as_avx2()
        print(torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported(),
              torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_fp16_supported(),
              torch.backends.cpu.get_cpu_capability())
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **isa.AVX2_VARIABLES},
        check=True,
    )
    *answers, capability = done.stdout.split()
    assert answers == ["False"] * 4
    assert "512" not in capability
