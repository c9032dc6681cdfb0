"""vLLM on CPU with this package's kernels: the plug-in that vLLM finds by its entry point.

vLLM calls `register` in each of its processes, long before most of them need a model. It imports
neither torch nor vLLM: what it asks for happens when vLLM imports its model loaders (`hook`).
"""

from __future__ import annotations

import functools
import os

SWITCH = "SPLITPOINT_VLLM"
"""The environment variable that turns the plug-in off with "0"."""

KEY = "splitpoint"
"""The object of vLLM's `--additional-config` with the plug-in's settings."""

LOADER = "vllm.model_executor.model_loader.base_loader"
"""The module of vLLM that is imported where a model is to be loaded, and not long before."""

COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator"
"""The module of vLLM that makes the memory in which tensor-parallel ranks sum."""
BROADCAST = "vllm.distributed.device_communicators.shm_broadcast"
"""The module of vLLM that makes the memory by which its processes tell each other what to do."""


def register() -> None:
    """Have vLLM's unquantised linear layers run on this package's kernels where they are faster."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    from .hook import when_imported

    when_imported(LOADER, _install)
    when_imported(COMMUNICATOR, functools.partial(_tidy, "install_for_ranks"))
    when_imported(BROADCAST, functools.partial(_tidy, "install_for_queues"))


def _install() -> None:
    from .fence import fence

    with fence():
        from .stand_in import install

        install()


def _tidy(install: str) -> None:
    from .fence import fence

    with fence("files in /dev/shm stay after a kill"):
        from . import shared_files

        getattr(shared_files, install)()
