"""`splitpoint bench vllm`: vLLM's engine on CPU, with this package's kernels and without."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..integrations.vllm import SWITCH
from ..ranges import align
from ..report.environment import environment
from ..torch_internals.instruction_sets import AVX2_VARIABLES
from .differences import LONGEST_PROMPT, compare
from .engine_check import TOKENS, CheckReport
from .rounding import Rounding, in_words

Say = Callable[[str], None]

WAYS = ("vllm", "with splitpoint")
OTHERS = ("zentorch",)
"""What else there may be between these: vLLM with AMD's package, which is hidden from the rest."""


@dataclass(frozen=True)
class EngineReport:
    """The outcome; `print` it for the table."""

    environment: dict[str, Any]
    starts: tuple[dict[str, Any], ...]
    """What each process said, and which way it went; those that follow each other, one of each
    way, are compared."""

    @property
    def ways(self) -> list[str]:
        """Those that there are, this package's last."""
        return list(dict.fromkeys(start["way"] for start in self.starts))

    def to_json(self) -> str:
        """`{"environment": {...}, "starts": [...]}`."""
        return json.dumps({"environment": self.environment, "starts": self.starts}, indent=2)

    def __str__(self) -> str:
        env = self.environment
        *others, ours = self.ways
        rows = [("milliseconds", *self.ways, *(f for way in others for f in _heads(way, others)))]
        for what in self.starts[0]["seconds"]:
            seconds = {
                way: [start["seconds"][what] for start in self.starts if start["way"] == way]
                for way in self.ways
            }
            medians = {way: statistics.median(each) for way, each in seconds.items()}
            cells = [what, *(f"{1e3 * each:.1f}" for each in medians.values())]
            for way in others:
                ratios = sorted(a / b for a, b in zip(seconds[way], seconds[ours], strict=True))
                cells += [
                    f"{medians[way] / medians[ours]:.2f}x",
                    f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                ]
            rows.append(tuple(cells))
        processes = len(self.starts) // len(self.ways)
        said = dict.fromkeys(line for start in self.starts for line in start["said"])
        return "\n".join(
            [
                f"{env['model']}, {env['dtype']}, {env['threads']} threads, {env['mode']}; "
                f"{env['clock']}, medians of {processes} processes each, in turn",
                f"vLLM {env['vllm']}, torch {env['torch']} on {env['cpu']}, {env['vectors']}",
                *(["as if the CPU had AVX2 alone"] if env["isa"] == "avx2" else []),
                *([f"with splitpoint, {in_words(env['rounding'])}"] if env["rounding"] else []),
                "",
                *align(rows, right=range(1, len(rows[0]))),
                "",
                *said,
            ]
        )


def run(
    model: str,
    *,
    dtype: str = "bf16",
    threads: int = 1,
    batches: Sequence[int] = (1, 4, 8),
    prompt: int = 512,
    tokens: int = 64,
    starts: int = 2,
    eager: bool = True,
    isa: str | None = None,
    rounding: Rounding | None = None,
    others: Sequence[str] = (),
    say: Say = lambda line: None,
) -> EngineReport:
    """Start engines in turn, one way and the other, and time each.

    Args:
        model: as `models.catalogue.find` takes it; with its weights in a folder.
        dtype: "bf16" or "fp32".
        threads: of torch's kernels.
        batches: requests at a time, of which the time for each further token is taken.
        prompt: the length of the prompt whose time to the first token is taken.
        tokens: that each request makes.
        starts: processes each way.
        eager: whether vLLM compiles nothing (`--enforce-eager`).
        isa: "avx2" to have vLLM, torch, oneDNN and this package go without AVX-512 and AMX, in so
            far as they ask torch or the environment; code that the compiler made for this CPU
            stays.
        rounding: what this package rounds "weights" and "activations" to, where it is there.
        others: of `OTHERS`, what is timed too.
        say: is told what goes on.

    Raises:
        UsageError: when vLLM or one of `others` is not installed, or a process fails.
        ModelNotFound: as `find`.
    """
    task = {
        **_task(model, dtype, threads, eager),
        "isa": isa,
        "rounding": dict(rounding or {}),
        "batches": list(batches),
        "prompt": prompt,
        "tokens": tokens,
    }
    if missing := [name for name in others if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{missing[0]} is not installed: leave it out of --others, or install it")
    found: list[dict[str, Any]] = []
    ways = (WAYS[0], *(name for name in OTHERS if name in others), WAYS[1])
    for turn, way in itertools.product(range(starts), ways):
        say(f"{way}, process {turn + 1} of {starts} ...")
        found.append({"way": way, **_start(task, way)})
    clock = "CPU time" if threads == 1 else "wall time"
    about = {
        **_about(found, model, dtype, threads, eager),
        "clock": clock,
        "isa": isa,
        "rounding": dict(rounding or {}),
    }
    return EngineReport(about, tuple(found))


def check(
    model: str,
    *,
    dtype: str = "bf16",
    threads: int = 1,
    prompts: int = 64,
    eager: bool = True,
    say: Say = lambda line: None,
) -> CheckReport:
    """Let an engine answer each way, greedily, up to eight prompts at a time.

    Args:
        model: as `run`.
        dtype: "bf16" or "fp32".
        threads: of torch's kernels.
        prompts: how many, of 1 to 100 random tokens.
        eager: as `run`.
        say: is told what goes on.

    Raises:
        UsageError: as `run`.
        ModelNotFound: as `run`.
    """
    task = {
        **_task(model, dtype, threads, eager),
        "batches": [8],
        "prompt": LONGEST_PROMPT,
        "tokens": TOKENS,
        "check": prompts,
    }
    found = []
    for way in WAYS:
        say(f"{way} ...")
        found.append(_start(task, way))
    about = _about(found, model, dtype, threads, eager)
    return CheckReport(about, compare(found[0]["answers"], found[1]["answers"]))


def _task(model: str, dtype: str, threads: int, eager: bool) -> dict[str, Any]:
    """What a process is told in any case."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("vLLM is not installed: docs/vllm.md says how")
    from ..models.catalogue import find

    folder = find(model)[2]
    if folder is None:
        raise UsageError(f"{model} has no folder with weights that vLLM could load")
    return {
        "folder": str(folder),
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        "threads": threads,
        "eager": eager,
        "check": 0,
        "isa": None,
        "rounding": {},
    }


def _about(
    found: Sequence[dict[str, Any]], model: str, dtype: str, threads: int, eager: bool
) -> dict[str, Any]:
    return {
        **environment(),
        **found[0]["about"],
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "mode": "enforce_eager" if eager else "compiled by vLLM",
        "vectors": found[-1]["instruction_set"],
    }


def _heads(way: str, others: Sequence[str]) -> tuple[str, str]:
    """Of the columns that compare with a way; which one is clear where there is one."""
    return ("ratio" if len(others) == 1 else f"over {way}", "of the pairs")


def _start(task: dict[str, Any], way: str) -> dict[str, Any]:
    """What one process says."""
    task = {**task, "ours": way == WAYS[1], "zentorch": way == "zentorch"}
    command = [sys.executable, "-m", "splitpoint.bench.engine_worker", json.dumps(task)]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(task["threads"]),
        "PYTHONPATH": os.pathsep.join(paths),
        SWITCH: "1" if task["ours"] else "0",
        **(AVX2_VARIABLES if task["isa"] == "avx2" else {}),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    if done.returncode:
        raise UsageError(f"a process with vLLM failed: {lines[-1] if lines else 'no message'}")
    answer: dict[str, Any] = json.loads(
        next(line for line in reversed(lines) if line.startswith('{"seconds"'))
    )
    said = [line.partition("Splitpoint: ")[2] for line in lines if "Splitpoint: " in line]
    return {**answer, "said": said}
