"""Start vLLM's engine in a process of its own, and read what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here: docs/vllm.md says how",
    ),
]


@dataclass
class Answer:
    tokens: list[list[int]]
    kernels: list[str]
    freed: list[bool]
    imported: list[str]
    said: str
    """The lines of its log that are this package's."""


def start(model: Path, cache: Path, prefix: tuple[str, ...] = (), **task: Any) -> Answer:
    env, code = task.pop("env", {}), task.pop("code", 0)
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm-own"),
        "HF_HUB_OFFLINE": "1",
        "SPLITPOINT_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join(paths),
        **env,
    }
    text = json.dumps({"model": str(model), **task})
    command = [*prefix, sys.executable, "-m", "tests.integrations.vllm.engine", text]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, start_new_session=True
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == code, done.stderr[-4000:]
    answer = next(line for line in reversed(lines) if line.startswith('{"tokens"'))
    said = [line for line in lines if "Splitpoint: " in line]
    return Answer(**json.loads(answer), said="\n".join(said))
