"""Take the names of the memory that vLLM's ranks share, once all of them have it.

The memory stays until the last rank ends; without a name nothing is left of it after a kill.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from . import names

FOLDER = Path("/dev/shm")


def install() -> None:
    """Replace the function of vLLM after which the names are not needed.

    Raises:
        UnsupportedVllm: when it is not what it is taken to be.
    """
    names.check((names.SHARED_MEMORY,))
    theirs = names.SHARED_MEMORY.value

    def init_cpu_shm(self: Any) -> int:
        handle: int = theirs(self)
        take_name(self.group_name, self.communicator.rank)
        return handle

    names.SHARED_MEMORY.replace(init_cpu_shm)


def take_name(group: str, rank: int) -> None:
    """Remove the name of this rank's file; the others remove theirs."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(FOLDER / f"{group}_{rank}")
