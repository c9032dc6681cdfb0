"""`splitpoint bench startup`: cold and warm starts in fresh processes, beside torch.compile."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UsageError
from ..ranges import align
from ..report.environment import environment

Say = Callable[[str], None]

COUNTS = ("ranges", "pieces", "unique_pieces", "packed_bytes", "mapped_bytes")
PARTS = ("capture", "compile", "load", "pack", "first_call")


@dataclass(frozen=True)
class StartupReport:
    """The outcome; `print` it for the table."""

    environment: dict[str, Any]
    figures: dict[str, Any]
    """CPU seconds, children included: `avg_cold_startup_time` and so on; packing weights is
    apart, as loading them is."""

    def to_json(self) -> str:
        """`{"environment": {...}, ...}` with the figures beside it."""
        return json.dumps({"environment": self.environment, **self.figures}, indent=2)

    def __str__(self) -> str:
        figures, env = self.figures, self.environment
        rows = [("start", *(part.replace("_", " ") for part in PARTS), "all but pack", "all")]
        for name in ("cold", "warm"):
            parts = figures[f"{name}_parts"]
            rest = figures[f"avg_{name}_startup_time"]
            seconds = [*(parts[part] for part in PARTS), rest, rest + parts["pack"]]
            rows.append((name, *(f"{each:.3f}" for each in seconds)))
        lines = [
            f"{env['model']}, {env['dtype']}, {env['threads']} threads, {figures['ranges']} "
            f"ranges, {figures['unique_pieces']} unique pieces, "
            f"{figures['packed_bytes'] / 2**20:.0f} MiB of packed weights, "
            f"{figures['mapped_bytes'] / 2**20:.0f} of them mapped; CPU s, children included",
            f"torch {env['torch']} on {env['cpu']}",
            "",
            *align(rows, right=range(1, len(rows[0]))),
        ]
        if "torch_compile_avg_warm_startup_time" in figures:
            cold = figures["torch_compile_avg_cold_startup_time"]
            warm = figures["torch_compile_avg_warm_startup_time"]
            lines += [
                "",
                f"torch.compile(dynamic=True) with its own caches: cold {cold:.1f}, warm "
                f"{warm:.1f}: {cold / figures['avg_cold_startup_time']:.1f} and "
                f"{warm / figures['avg_warm_startup_time']:.0f} times as much",
            ]
        return "\n".join(lines)


def run(
    model: str,
    config: Config,
    *,
    layers: int | None = None,
    dtype: str = "bf16",
    threads: int = 1,
    warm_starts: int = 3,
    torch_compile: bool = True,
    say: Say = lambda line: None,
) -> StartupReport:
    """Start a model in fresh processes from an empty store, then from the one left behind.

    Raises:
        UsageError: when a process fails.
    """
    task = {"model": model, "layers": layers, "dtype": dtype, "threads": threads}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        kept = {**json.loads(config.to_json()), "cache_dir": f"{folder}/store"}
        own = {**task, "way": "splitpoint", "config": kept}
        say("starting with an empty store ...")
        cold = _start(own, f"{folder}/inductor")
        say(f"starting {warm_starts} times with a full one ...")
        warm = [_start(own, f"{folder}/none") for _ in range(warm_starts)]
        figures |= _figures("", [cold], warm)
        figures["cold_parts"] = cold["parts"]
        figures["warm_parts"] = {
            part: statistics.median(each["parts"][part] for each in warm) for part in PARTS
        }
        figures |= {name: warm[0][name] for name in COUNTS}
        figures["imported_when_warm"] = warm[0]["imported"]
        if torch_compile:
            other = {**task, "way": "torch.compile", "config": kept}
            say("starting torch.compile with empty caches ...")
            cold = _start(other, f"{folder}/torch")
            say("starting torch.compile with full ones ...")
            warm = [_start(other, f"{folder}/torch")]
            figures |= _figures("torch_compile_", [cold], warm)
    return StartupReport({**environment(), **task}, figures)


def _figures(prefix: str, cold: list[dict[str, Any]], warm: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, starts in (("cold", cold), ("warm", warm)):
        times = [start["startup"] for start in starts]
        found[f"{prefix}avg_{name}_startup_time"] = statistics.mean(times)
        found[f"{prefix}{name}_startup_times"] = times
        compiling = [start["parts"]["capture"] + start["parts"]["compile"] for start in starts]
        found[f"{prefix}avg_{name}_compilation_time"] = statistics.mean(compiling)
    return found


def _start(task: dict[str, Any], inductor_cache: str) -> dict[str, Any]:
    """What one process says."""
    command = [sys.executable, "-m", "splitpoint.bench.startup_worker", json.dumps(task)]
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": inductor_cache,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(task["threads"]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"a process that was to start {task['model']} failed: {said}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
