"""vLLM on CPU with this package's kernels: the plug-in that vLLM finds by its entry point.

vLLM calls `register` in each of its processes, long before most of them need a model. It imports
neither torch nor vLLM: what it asks for happens when vLLM imports its model loaders (`hook`).
"""

from __future__ import annotations

import os

SWITCH = "SPLITPOINT_VLLM"
"""The environment variable that turns the plug-in off with "0"."""


LOADER = "vllm.model_executor.model_loader.base_loader"
"""The module of vLLM that is imported where a model is to be loaded, and not long before."""

COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator"
"""The module of vLLM that makes the memory that tensor-parallel ranks share."""


def register() -> None:
    """Have vLLM's unquantised linear layers run on this package's kernels where they are faster."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    from .hook import when_imported

    when_imported(LOADER, _install)
    when_imported(COMMUNICATOR, _tidy)


def _install() -> None:
    from .fence import fence

    with fence():
        from .stand_in import install

        install()


def _tidy() -> None:
    from .fence import fence

    with fence("its ranks' files in /dev/shm stay after a kill"):
        from .shared_files import install

        install()
