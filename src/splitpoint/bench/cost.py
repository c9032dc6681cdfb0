"""What a piece of work cost, with the compiler processes it set to work."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PROC = Path("/proc")


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds."""

    cpu_s: float
    """CPU time of this process and its descendants, user and system. Outside Linux, of those
    descendants only that have ended."""
    wall_s: float


def cost_of(work: Callable[[], T]) -> tuple[T, Cost]:
    """Do `work` and count what it cost, in this process and in processes under it."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = work()
    return result, Cost(cpu_seconds() - cpu, time.perf_counter() - wall)


def cpu_seconds() -> float:
    """CPU seconds that this process and its descendants have used so far.

    Inductor compiles in a pool of processes that outlives the compilation. The kernel adds a
    child's time to its parent's only once the child has ended and was waited for, so the time
    of live descendants is read from /proc (Linux; elsewhere they are left out).
    """
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + _live_descendants_s()


def _live_descendants_s() -> float:
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        # The command name, in parentheses, may hold anything; what follows it is regular:
        # state, parent, ... and as fields 14 to 17 of the line utime, stime, cutime, cstime.
        fields = text.rpartition(")")[2].split()
        pid = int(folder.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(map(int, fields[11:15]))
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    mine.remove(os.getpid())
    return sum(ticks[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")
