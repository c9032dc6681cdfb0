"""`python -m splitpoint.bench.device`: what ranges are worth on a device, in eight minutes at most.

Parts run one after the other, each in a process of its own, which is ended when its time is over:
one that fails or hangs costs no other (with `--quick` they share one). What they find goes to
`device.jsonl` in the folder of `--out` (or $OUT) line by line. Not run on a GPU so far; `--device
cpu --quick` is a dry run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import device_parts as parts
from .device_parts import PARTS, Task

RESULTS = "device.jsonl"

MINUTES = 8.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m splitpoint.bench.device",
        description="Check and time splitpoint on a device; rows of JSON as they come.",
    )
    made.add_argument("--device", default="cuda", help="cuda (the default), or cpu for a dry run")
    made.add_argument("--quick", action="store_true", help="a tiny model and few sizes")
    made.add_argument("--out", type=Path, default=None, help="folder for results, else $OUT or .")
    made.add_argument("--parts", default=",".join(PARTS), help="which, of " + ", ".join(PARTS))
    made.add_argument("--skip", default="", help="parts to leave out")
    made.add_argument("--minutes", type=float, default=MINUTES, help="for all of them together")
    made.add_argument("--layers", type=int, default=16, help="of the model; 16 is a Llama of 1B")
    for name in ("--part", "--start", "--store"):
        made.add_argument(name, default="", help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    found = made.parse_args(argv)
    for name in (*_listed(found.parts), *_listed(found.skip)):
        if name not in PARTS:
            made.error(f"there is no part {name!r}: the parts are {', '.join(PARTS)}")
    return found


def _listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def say(path: Path, part: str, **row: Any) -> None:
    """Write a row, whole or not at all."""
    line = json.dumps({"part": part, "at": round(time.time(), 1), **row}, default=str) + "\n"
    with open(path, "a") as file:
        file.write(line)
    print(line, end="", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 0 unless one of them failed.

    A part that was cut, or left out for want of time, is none that failed.
    """
    given = _arguments(argv)
    out = given.out or Path(os.environ.get("OUT") or ".")
    out.mkdir(parents=True, exist_ok=True)
    results = out / RESULTS
    if given.part:
        return _one(given, out, results)
    end = time.monotonic() + 60 * given.minutes
    for name in (names := _listed(given.parts)):
        if name in _listed(given.skip):
            say(results, name, left_out="asked for")
    names = [name for name in names if name not in _listed(given.skip)]
    with tempfile.TemporaryDirectory(prefix="splitpoint-", ignore_cleanup_errors=True) as store:
        failed = _run_all(given, names, out, end, store)
    say(results, "all", failed=failed, left_s=round(end - time.monotonic(), 1))
    return 1 if failed else 0


def _run_all(
    given: argparse.Namespace, names: Sequence[str], out: Path, end: float, store: str
) -> int:
    """Run parts, as long as there is time; how many failed."""
    results, failed = out / RESULTS, 0
    # In a dry run, starting processes would be most of it.
    for group in [names] if given.quick else [[name] for name in names]:
        left = end - time.monotonic()
        if left < 5:
            say(results, ",".join(group), left_out="no time left")
            continue
        seconds = sum(PARTS[name][1] for name in group)
        failed += _run(given, ",".join(group), out, store, min(seconds, left))
    return failed


def _run(given: argparse.Namespace, name: str, out: Path, store: str, seconds: float) -> bool:
    """Run a part in a process of its own; whether it failed."""
    results = out / RESULTS
    command = [sys.executable, "-m", "splitpoint.bench.device", "--part", name]
    command += ["--store", store]
    command += ["--device", given.device, "--out", str(out), "--layers", str(given.layers)]
    # What it begins last may take a while: it is told of less time than it is given.
    command += ["--seconds", str(0.85 * seconds)] + ["--quick"] * given.quick
    start = time.monotonic()
    try:
        rc = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        say(results, name, cut_after_s=round(seconds))
        return False
    say(results, name, exit=rc, took_s=round(time.monotonic() - start, 1))
    return rc != 0


def _one(given: argparse.Namespace, out: Path, results: Path) -> int:
    """One part, or several, in this process."""
    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    store = Path(given.store)
    task = Task(device, given.quick, given.layers, time.monotonic() + given.seconds, out, store)
    if given.part == "start":
        parts.start(task, functools.partial(say, results, "starts"), given.start)
        return 0
    for name in _listed(given.part):
        start = time.monotonic()
        PARTS[name][0](task, functools.partial(say, results, name))
        say(results, name, done=True, took_s=round(time.monotonic() - start, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
