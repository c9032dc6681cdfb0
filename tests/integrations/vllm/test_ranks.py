"""vLLM's tensor parallelism with this package: two ranks answer as one does, and leave nothing."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from splitpoint.collectives import shm

from .starting import NEEDS_VLLM, Answer, start

pytestmark = [
    *NEEDS_VLLM,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores"),
]

TWO = {"tensor_parallel_size": 2}
BIND = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_HOST_IP": "127.0.0.1"}
RANGES = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 2,
        "backend": "splitpoint",
        "custom_ops": ["none"],
        "compile_ranges_endpoints": [2, 16],
    },
}


@pytest.fixture
def shared_cache(cache: Path) -> Path:
    """As `cache`, with the collectives."""
    shutil.copy2(shm.load(), cache / "kernels")
    return cache


def vllm_files() -> set[str]:
    """All in /dev/shm but the few bytes of a semaphore, which are Python's."""
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names if not name.startswith("sem.")}


def test_two_ranks_say_the_same_with_the_kernels_and_leave_no_file_when_killed(
    model: Path, cache: Path, own: Answer
) -> None:
    before = vllm_files()
    kill = "import os, signal; os.killpg(0, signal.SIGKILL)"
    answer = start(model, cache, llm=TWO, env=BIND, after=kill, code=-signal.SIGKILL)
    assert answer.tokens == own.tokens
    assert answer.said.count("packed kernels for linear layers") == 2
    assert vllm_files() == before


def test_two_ranks_fuse_two_norms_a_layer_and_say_the_same(
    model: Path, shared_cache: Path, own: Answer
) -> None:
    before = vllm_files()
    env = {**BIND, "VLLM_USE_LAYERNAME": "0"}
    answer = start(model, shared_cache, llm={**TWO, **RANGES}, env=env)
    assert answer.tokens == own.tokens
    # Two of each of the two layers, and the embedding's.
    ranges = "5 in [1,1], 5 in [2,2], 5 in [3,16], 5 in [17,128]"
    line = f"5 all-reduces over its shared memory; fused with a norm: {ranges}"
    assert answer.said.count(line) == 2, answer.said
    assert vllm_files() == before

    second = start(model, shared_cache, llm={**TWO, **RANGES}, env=env)
    assert second.tokens == own.tokens
    assert second.said.count("as they were kept: nothing is compiled") == 2, second.said
