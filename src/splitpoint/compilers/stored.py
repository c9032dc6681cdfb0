"""Compile a piece unless a store has it already."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..capture.assumptions import Assumption
from ..errors import CompileError, SplitpointError
from ..passes.base import Pass
from ..passes.manager import MatchCount, PassManager
from ..ranges import PlannedRange, Range
from ..store import key
from ..store.store import Store
from ..torch_internals.questions import can_be_noted
from . import artifact, inductor
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
    origin: Literal["compiled", "store", "program"]
    """Whether it was compiled now, is from the store, or was made before for another signature."""


class _NotAsOne(Exception):
    """Several ranges cannot be compiled as one; says why."""


@dataclass
class PieceCompiler:
    """Compiles pieces, through a store where there is one."""

    store: Store | None
    passes: Sequence[Pass]
    workers: int | None = None
    """As `Config.compile_workers`."""
    libraries: artifact.Libraries = field(default_factory=artifact.Libraries)
    _batch: Batch | None = None
    _alike: dict[str, list[PlannedRange]] = field(default_factory=dict)
    """Ranges that differ in bounds and hint only, by what is compiled for them."""
    _shared: dict[str, Result | None] = field(default_factory=dict)
    """What was compiled for all of them; None where that failed."""
    _made: dict[tuple[Any, ...], Result] = field(default_factory=dict)
    """By what was asked for."""

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
            self._made.clear()
            batch.finish()
            raise
        else:
            batch.finish()
        finally:
            batch.close()
            self._batch = None

    def expect(
        self,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> None:
        """Announce a call of `compile`. Ranges that are announced for the same piece, with the
        same kernels, options and passes, are compiled as one; each whose own bounds would change
        nothing in that code has it, the others are compiled on their own."""
        name = self._what(piece, planned, options, trusted)
        if name is not None and planned not in (alike := self._alike.setdefault(name, [])):
            alike.append(planned)

    def _what(
        self,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> str | None:
        """What is compiled for a range, apart from its bounds and hint; None when they may mean
        more than what torch answers about sizes."""
        if not can_be_noted():
            return None
        manager = PassManager(self.passes, piece.fingerprint, planned.range)
        several = not piece.dims.is_size_alone
        if planned.range.is_single_size or several or not all(p.asks_torch for p in manager.passes):
            return None
        settings = {**planned.options, **options}
        what = [piece.fingerprint, manager.uuid(), settings, sorted(trusted)]
        return json.dumps(what, sort_keys=True, default=repr)

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
            uuid = PassManager(self.passes, piece.fingerprint, planned.range).uuid()
            settings = json.dumps({**planned.options, **options}, sort_keys=True, default=repr)
            asked = (
                piece.fingerprint,
                planned.range,
                planned.hint,
                planned.lengths,
                uuid,
                settings,
                tuple(trusted),
            )
            if asked in self._made:
                return replace(self._made[asked], origin="program")
            made = self._one(self._batch, piece, planned, options, trusted)
            self._made[asked] = made
            return made

    def _one(
        self,
        batch: Batch,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> Result:
        name = self._what(piece, planned, options, trusted)
        parts = self._alike.get(name, []) if name is not None else []
        if name is not None and len(parts) > 1 and planned in parts:
            if name not in self._shared:
                self._shared[name] = self._for_all(batch, piece, parts, options, trusted)
            found = self._shared[name]
            if found is not None and planned.range in found.compiled.serves:
                return _for_range(found, planned.range)
        return self._through(batch, piece, planned, options, trusted)

    def _for_all(
        self,
        batch: Batch,
        piece: Piece,
        parts: Sequence[PlannedRange],
        options: Mapping[str, Any],
        trusted: Sequence[int],
    ) -> Result | None:
        """The piece for several lines of the plan; None where only their own compiles may work."""
        last = max(parts, key=lambda part: part.range.end)
        first = min(part.range.start for part in parts)
        around = replace(last, range=Range(first, last.range.end))
        try:
            return self._through(batch, piece, around, options, trusted, parts)
        except _NotAsOne as why:
            log.info("ranges of piece %s are compiled one by one: %s", piece.fingerprint, why)
            return None

    def _through(
        self,
        batch: Batch,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
        parts: Sequence[PlannedRange] = (),
    ) -> Result:
        what = f"piece {piece.fingerprint} for {planned.range}"
        name = self._key(piece, planned, options, trusted, parts)
        if self.store is None or name is None:
            compiled = self._compile(piece, planned, options, trusted, parts)
            if compiled.serves or not parts:
                batch.add(Waiting(what, compiled))
            return Result(compiled, None, "compiled")
        digest, fields = name
        if (found := self._load(self.store, digest, piece, planned)) is not None:
            return Result(found, digest, "store")
        found = self._load(self.store, digest, piece, planned) if batch.lock(digest) else None
        if found is not None:
            return Result(found, digest, "store")
        compiled = self._compile(piece, planned, options, trusted, parts)
        if compiled.serves or not parts:
            batch.add(Waiting(what, compiled, digest, fields))
        return Result(compiled, digest, "compiled")

    def _compile(
        self,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
        parts: Sequence[PlannedRange],
    ) -> inductor.Compiled:
        try:
            return inductor.compile_piece(piece, planned, self.passes, options, trusted, parts)
        except CompileError as error:
            if parts:
                raise _NotAsOne(str(error)) from error
            raise

    def _key(
        self,
        piece: Piece,
        planned: PlannedRange,
        options: Mapping[str, Any],
        trusted: Sequence[int],
        parts: Sequence[PlannedRange] = (),
    ) -> tuple[str, dict[str, str]] | None:
        if self.store is None:
            return None
        from ..graph.fingerprint import NotPortable, describe

        try:
            description = describe(piece.graph_module, piece.values, piece.symbols)
        except NotPortable as why:
            log.info("store: piece %s is not kept: it has %s", piece.fingerprint, why)
            return None
        uuid = PassManager(self.passes, piece.fingerprint, planned.range).uuid()
        try:
            fields = key.piece_fields(piece, description, [planned, *parts], uuid, options, trusted)
        except key.NoIdentity as why:
            log.info("store: piece %s is not kept: it has %s", piece.fingerprint, why)
            return None
        return key.digest(fields), fields

    def _load(
        self, store: Store, digest: str, piece: Piece, planned: PlannedRange
    ) -> inductor.Compiled | None:
        found = artifact.load(store, digest, self.libraries)
        if found is None:
            return None
        return read_artifact(found, piece, planned.range)


def read_artifact(found: artifact.Artifact, piece: Piece, range_: Range) -> inductor.Compiled:
    """A kept piece as the compiler would have returned it."""
    names, fingerprint = piece.dims.names, piece.fingerprint
    assumptions = tuple(
        Assumption(code, origin, names) for code, origin in found.entry["assumptions"]
    )
    matches = tuple(MatchCount.from_kept(m, fingerprint, range_) for m in found.entry["matches"])
    steps = inductor.piece_steps(found.entry["steps"], found.kernels)
    serves = tuple(Range(start, end) for start, end in found.entry["serves"])
    return inductor.Compiled(found.call, assumptions, matches, steps=steps, serves=serves)


def _for_range(found: Result, range_: Range) -> Result:
    """What was compiled for several ranges, as one of them has it."""
    matches = tuple(replace(match, range=range_) for match in found.compiled.matches)
    return replace(found, compiled=replace(found.compiled, matches=matches))
