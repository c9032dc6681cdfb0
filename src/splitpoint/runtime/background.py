"""Compile in a thread of its own, one thing after the other, while calls are served."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable

from .process_settings import Lent

log = logging.getLogger("splitpoint")

SWITCH_INTERVAL_S = 0.0005
"""How long the thread that compiles may keep others waiting for the interpreter, at a time.
Python's own 5 ms add up over the operators of a call."""

_switch_interval = Lent(sys.getswitchinterval, sys.setswitchinterval)


class Stopped(Exception):
    """What was being compiled is no longer wanted."""


class Background:
    """A thread that compiles what is wanted, and is there only as long as there is something.

    Args:
        compile: called in the thread with what is wanted; it may call `check_stop` in between.
    """

    def __init__(self, compile: Callable[[int], None]) -> None:
        self._compile = compile
        self._queue: deque[int] = deque()
        self._seen: set[int] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._changed = threading.Condition()
        self.errors: dict[int, BaseException] = {}
        """What failed, and how."""

    def want(self, index: int, soon: bool = False) -> None:
        """Have something compiled, before all else that waits if `soon`. Nothing is compiled
        twice, nor again after it failed."""
        if index in self._seen and not (soon and index in self._queue):
            return
        with self._changed:
            if self._closed:
                return
            if index not in self._seen:
                self._seen.add(index)
                self._queue.append(index)
            if soon and index in self._queue:
                self._queue.remove(index)
                self._queue.appendleft(index)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="splitpoint-compile")
                self._thread.start()

    def check_stop(self) -> None:
        """Called in the thread.

        Raises:
            Stopped: when `close` was called, or the program ends.
        """
        if self._closed or not threading.main_thread().is_alive():
            raise Stopped

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to compile; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout_s)

    def close(self) -> None:
        """Compile nothing more, and wait for the thread, which ends after the piece that it is
        at."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        with contextlib.ExitStack() as lent:
            lent.enter_context(_switch_interval.at(lambda before: min(before, SWITCH_INTERVAL_S)))
            while (index := self._next(at_end=lent.close)) is not None:
                try:
                    self.check_stop()
                    self._compile(index)
                except Stopped:
                    pass
                except BaseException as error:  # noqa: BLE001  nobody is above this to see it
                    self.errors[index] = error
                    log.error("compiling in the background failed: %s", error)

    def _next(self, at_end: Callable[[], None]) -> int | None:
        with self._changed:
            if self._queue and threading.main_thread().is_alive():
                return self._queue.popleft()
            at_end()
            self._thread = None
            self._changed.notify_all()
            return None
