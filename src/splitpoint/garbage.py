"""Keep Python's garbage collector from searching all that tracing makes, again and again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

RARE = (100_000, 50, 1_000)
"""Thresholds under which the youngest objects are searched now and then, and the oldest, which
are most of the process, hardly ever."""


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """For what makes no garbage, but would set off a collection of all that the process holds,
    which takes longer than everything else there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def rare_collection() -> Iterator[None]:
    """For capturing and compiling, which make millions of objects that stay until the end: 6 %
    of the time would go into searching them."""
    before = gc.get_threshold()
    gc.set_threshold(*RARE)
    try:
        yield
    finally:
        gc.set_threshold(*before)
