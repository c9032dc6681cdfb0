"""The one place where any failure is caught: a server starts without this package's kernels
rather than not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("vllm.splitpoint")
"""Below vLLM's own logger, so that its lines appear among vLLM's."""

OWN = "vLLM's own linear layers are used"


@contextmanager
def fence(instead: str = OWN) -> Iterator[None]:
    """Turn what is raised inside into one line that says what happens instead, and why."""
    try:
        yield
    # Not only the errors of this package: what is inside runs within vLLM's own loading, in
    # versions of vLLM and torch that nobody has tried it with.
    except Exception as error:  # noqa: BLE001
        lines = str(error).splitlines() or [""]
        log.warning(
            "Splitpoint: %s, because of %s: %s",
            instead,
            type(error).__name__,
            lines[0],
        )
