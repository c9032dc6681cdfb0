"""Whether the threads of torch have a core each.

Threads that share a core wait for each other at the end of every layer: kernels then took three
times as long as with one thread.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ...errors import SharedCores


def cores_of_threads() -> int:
    """How many cores the threads of this process may run on, all of them together."""
    torch.ones(1 << 20).add_(1)  # threads are there once there was work for them
    cores: set[int] = set()
    for task in Path("/proc/self/task").glob("*"):
        try:
            cores |= os.sched_getaffinity(int(task.name))
        except ProcessLookupError:  # it ended meanwhile
            continue
    return len(cores)


def check_threads() -> None:
    """Compare torch's threads with the cores that they may run on.

    Raises:
        SharedCores: when there are fewer cores.
    """
    threads = torch.get_num_threads()
    if hasattr(os, "sched_getaffinity") and threads > (cores := cores_of_threads()):
        raise SharedCores(
            f"{threads} threads share {cores} core{'s' if cores > 1 else ''}; set "
            f"OMP_NUM_THREADS={cores}, or VLLM_CPU_OMP_THREADS_BIND to as many cores as threads"
        )
