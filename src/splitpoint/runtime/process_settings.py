"""Settings of the whole process that are changed while something runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Lent(Generic[T]):
    """A setting that several threads may change for a while, and end that in any order: what it was
    before the first comes back with the last."""

    def __init__(self, get: Callable[[], T], put: Callable[[T], None]) -> None:
        self._get = get
        self._put = put
        self._lock = threading.Lock()
        self._users = 0
        self._before: T

    @contextlib.contextmanager
    def at(self, choose: Callable[[T], T]) -> Iterator[None]:
        """Change it to what `choose` makes of the value before anybody changed it."""
        with self._lock:
            if not self._users:
                self._before = self._get()
            self._put(choose(self._before))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._put(self._before)
