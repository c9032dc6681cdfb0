"""What Dynamo and Inductor have once a process: the lock on their settings, and their loggers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from .probe import require


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silence a logger: of an error that is raised as well, or of what is known."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def compile_lock() -> contextlib.AbstractContextManager[bool]:
    """The lock that Dynamo holds while it compiles: its settings, and Inductor's, are those of
    the whole process."""
    require("capture")
    from torch._dynamo.convert_frame import compile_lock as lock

    return lock
