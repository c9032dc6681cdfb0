"""Take the names of the memory that vLLM's processes share, once all of them have it.

The memory stays until the last process ends; without a name nothing is left of it after a kill.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from . import names

FOLDER = Path("/dev/shm")


def install_for_ranks() -> None:
    """Take the names of the memory in which tensor-parallel ranks sum.

    Raises:
        UnsupportedVllm: when vLLM's function is not what it is taken to be.
    """
    names.check((names.SHARED_MEMORY,))
    theirs = names.SHARED_MEMORY.value

    def init_cpu_shm(self: Any) -> int:
        handle: int = theirs(self)
        take_name_of_rank(self.group_name, self.communicator.rank)
        return handle

    names.SHARED_MEMORY.replace(init_cpu_shm)


def install_for_queues() -> None:
    """Take the names of the memory by which processes tell each other what to do.

    Raises:
        UnsupportedVllm: when vLLM's function is not what it is taken to be.
    """
    names.check((names.QUEUE,))
    theirs = names.QUEUE.value

    def wait_until_ready(self: Any) -> None:
        theirs(self)
        take_name_of_queue(self)

    names.QUEUE.replace(wait_until_ready)


def take_name_of_rank(group: str, rank: int) -> None:
    """Remove the name of this rank's file; the others remove theirs."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(FOLDER / f"{group}_{rank}")


def take_name_of_queue(queue: Any) -> None:
    """Remove the name of the memory that this process made for a queue, if it did."""
    buffer = queue.buffer
    if buffer is not None and buffer.is_creator:
        buffer.is_creator = False  # it would take the name again at its end
        buffer.shared_memory.unlink()
