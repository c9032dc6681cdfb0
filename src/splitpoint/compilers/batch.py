"""Compiled pieces that wait for their kernels in C++, which are built together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import CompileError
from ..store.store import Store
from ..torch_internals import cpp_kernels as cpp
from . import artifact
from .inductor import Compiled


@dataclass(frozen=True)
class Waiting:
    """A compiled piece whose kernels are to be built."""

    what: str
    """For messages."""
    compiled: Compiled
    key: str | None = None
    """Under which it is to be kept; None if it is not."""
    fields: Mapping[str, str] = field(default_factory=dict)


class Batch:
    """Pieces compiled now, and the locks on their keys, which are held until they are kept.

    No lock is waited for while others are held, so that two processes never wait for each other,
    in whatever order they come to the same pieces.
    """

    def __init__(self, store: Store | None, workers: int | None = None) -> None:
        """`workers` are as `Config.compile_workers`."""
        self._store = store
        self._workers = workers
        self._waiting: list[Waiting] = []
        self._locks = contextlib.ExitStack()
        self._locked: set[str] = set()

    def lock(self, key: str) -> bool:
        """Hold the lock of a key until the pieces added are built and kept. While another process
        holds it, those that were added before are built and kept first.

        Raises:
            CompileError: as `finish`.
        """
        assert self._store is not None
        if key in self._locked:
            return True
        held = self._locks.enter_context(self._store.lock(key, wait=not self._locked))
        if not held and self._locked:
            self.finish()
            held = self._locks.enter_context(self._store.lock(key))
        if held:
            self._locked.add(key)
        return held

    def add(self, piece: Waiting) -> None:
        """Have a piece built and kept."""
        self._waiting.append(piece)

    def finish(self) -> None:
        """Build and keep the pieces added, and release the locks.

        Raises:
            CompileError: when the C++ compiler fails on a piece; the others are kept.
        """
        waiting, self._waiting = self._waiting, []
        try:
            try:
                kernels = [kernel for each in waiting for kernel in each.compiled.waiting]
                cpp.build(kernels, self._workers)
            except cpp.BuildFailed:
                self._one_by_one(waiting)
            else:
                for each in waiting:
                    self._keep(each)
        finally:
            self.close()

    def _one_by_one(self, waiting: list[Waiting]) -> None:
        failed: CompileError | None = None
        for each in waiting:
            try:
                cpp.build(each.compiled.waiting)
            except cpp.BuildFailed as error:
                failed = CompileError(f"the C++ compiler failed on {each.what}: {error}")
                failed.__cause__ = error
            else:
                self._keep(each)
        if failed is not None:
            raise failed

    def _keep(self, piece: Waiting) -> None:
        compiled = piece.compiled
        if self._store is None or piece.key is None or compiled.bare is None:
            return
        artifact.keep(
            self._store,
            piece.key,
            piece.fields,
            compiled.bare.wrapper,
            compiled.bare.kernels,
            {
                "assumptions": [[a.code, a.origin] for a in compiled.assumptions],
                "matches": [m.kept() for m in compiled.matches],
                "steps": compiled.bare.steps,
                "serves": [[part.start, part.end] for part in compiled.serves],
            },
            compiled.bare.binaries,
        )

    def close(self) -> None:
        """Release the locks."""
        self._locks.close()
        self._locked.clear()
