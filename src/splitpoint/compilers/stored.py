"""Compile a piece unless a store has it already."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import SplitpointError
from ..graph.assumptions import Assumption
from ..passes.base import Pass
from ..passes.manager import MatchCount, PassManager
from ..ranges import PlannedRange, Range
from ..store import artifact, key
from ..store.store import Store
from . import inductor
from .batch import Batch, Waiting

if TYPE_CHECKING:
    from ..graph.pieces import Piece

log = logging.getLogger("splitpoint")


@dataclass(frozen=True)
class Result:
    """A compiled piece, and where it comes from."""

    compiled: inductor.Compiled
    key: str | None
    """Its key in the store; None when there is none. It need not be there: writing may fail."""
    loaded: bool
    """Whether it was not compiled now."""


@dataclass
class PieceCompiler:
    """Compiles pieces, through a store where there is one."""

    store: Store | None
    passes: Sequence[Pass]
    workers: int | None = None
    """As `Config.compile_workers`."""
    libraries: artifact.Libraries = field(default_factory=artifact.Libraries)
    _batch: Batch | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside, pieces are compiled but for their kernels in C++, which are built, and kept, at
        the end of the outermost of these contexts: one run of the C++ compiler for all.

        Raises:
            CompileError: when the C++ compiler fails.
        """
        if self._batch is not None:
            yield
            return
        self._batch = batch = Batch(self.store, self.workers)
        try:
            yield
        except SplitpointError:  # of one piece; the others are good
            batch.finish()
            raise
        else:
            batch.finish()
        finally:
            batch.close()
            self._batch = None

    def compile(
        self,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> Result:
        """The piece for one line of the plan.

        Of several processes that ask for the same piece, one compiles it.

        Raises:
            CompileError, PassError: as `inductor.compile_piece`.
        """
        with self.together():
            assert self._batch is not None
            return self._through(self._batch, piece, planned, options, trusted)

    def _through(
        self,
        batch: Batch,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> Result:
        what = f"piece {piece.fingerprint} for {planned.range}"
        name = self._key(piece, planned, options, trusted)
        if self.store is None or name is None:
            compiled = self._compile(piece, planned, options, trusted)
            batch.add(Waiting(what, compiled))
            return Result(compiled, None, False)
        digest, fields = name
        if (found := self._load(self.store, digest, piece, planned)) is not None:
            return Result(found, digest, True)
        found = self._load(self.store, digest, piece, planned) if batch.lock(digest) else None
        if found is not None:
            return Result(found, digest, True)
        compiled = self._compile(piece, planned, options, trusted)
        batch.add(Waiting(what, compiled, digest, fields))
        return Result(compiled, digest, False)

    def _compile(
        self,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> inductor.Compiled:
        return inductor.compile_piece(piece, planned, self.passes, options, trusted)

    def _key(
        self,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> tuple[str, dict[str, str]] | None:
        if self.store is None:
            return None
        from ..graph.pieces import NotPortable, describe

        try:
            description = describe(piece)
        except NotPortable as why:
            log.info("store: piece %s is not kept: it has %s", piece.fingerprint, why)
            return None
        uuid = PassManager(self.passes, piece.fingerprint, planned.range).uuid()
        fields = key.piece_fields(piece, description, planned, uuid, options, trusted)
        return key.digest(fields), fields

    def _load(
        self, store: Store, digest: str, piece: Piece, planned: PlannedRange
    ) -> inductor.Compiled | None:
        found = artifact.load(store, digest, self.libraries)
        if found is None:
            return None
        return read_artifact(found, piece.fingerprint, planned.range)


def read_artifact(found: artifact.Artifact, fingerprint: str, range_: Range) -> inductor.Compiled:
    """A kept piece as the compiler would have returned it."""
    assumptions = tuple(Assumption(code, origin) for code, origin in found.entry["assumptions"])
    matches = tuple(MatchCount.from_kept(m, fingerprint, range_) for m in found.entry["matches"])
    steps = inductor.piece_steps(found.entry["steps"], found.kernels)
    return inductor.Compiled(found.call, assumptions, matches, steps=steps)
