"""Locks between processes, which fall when their holder ends, however it ends."""

from __future__ import annotations

import logging
import time
from pathlib import Path

log = logging.getLogger("splitpoint")


def locked(handle: int, path: Path, timeout_s: float | None) -> bool:
    """Lock an open file until it is closed; False where there are no locks, or the wait took too
    long, which is said.

    Args:
        handle: its descriptor.
        path: what it is to a reader of the log.
        timeout_s: how long to wait for another process that holds it; None not to.
    """
    import fcntl

    end = time.monotonic() + (timeout_s or 0.0)
    pause = 0.002
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if timeout_s is None:
                return False
            if time.monotonic() >= end:
                log.warning(
                    "store: another process has held %s for %.0f s; this one goes on without "
                    "waiting for it",
                    path,
                    timeout_s,
                )
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        except OSError:
            return False  # a file system without locks
        else:
            return True
