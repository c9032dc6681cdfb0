"""Keep Python's garbage collector from searching all that tracing makes, again and again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from .process_settings import Lent

RARE = (2_000_000, 50, 1_000)
"""Thresholds under which the youngest objects are searched once two million are there, which bounds
the garbage among them, and the oldest, which are most of the process, hardly ever."""

_thresholds = Lent(gc.get_threshold, lambda thresholds: gc.set_threshold(*thresholds))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """For what makes no garbage, but would set off a collection of all that the process holds,
    which takes longer than everything else there. What it makes counts as old afterwards, or
    the next object made would set off a search of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            _make_all_old()
            gc.enable()


@contextlib.contextmanager
def rare_collection() -> Iterator[None]:
    """For capturing and compiling, which make millions of objects that stay until the end: 6 %
    of the time would go into searching them. What is young in the end counts as old afterwards,
    and is searched when Python next searches everything."""
    with _thresholds.at(lambda _: RARE):
        try:
            yield
        finally:
            _make_all_old()


def _make_all_old() -> None:
    if not gc.get_freeze_count():  # what a program froze stays frozen
        gc.freeze()
        gc.unfreeze()
