"""Compile a piece unless a store has it already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..graph.assumptions import Assumption
from ..passes.base import Pass
from ..passes.manager import MatchCount, PassManager
from ..ranges import PlannedRange, Range
from ..store import artifact, key
from ..store.store import Store
from . import inductor

if TYPE_CHECKING:
    from ..graph.pieces import Piece

log = logging.getLogger("splitpoint")


@dataclass(frozen=True)
class Result:
    """A compiled piece, and where it comes from."""

    compiled: inductor.Compiled
    key: str | None
    """Its key in the store; None when it cannot be kept there."""
    loaded: bool
    """Whether it was not compiled now."""


@dataclass
class PieceCompiler:
    """Compiles pieces, through a store where there is one."""

    store: Store | None
    passes: Sequence[Pass]
    kernels: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Loaded kernels by digest."""

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
        name = self._key(piece, planned, options, trusted)
        if self.store is None or name is None:
            return Result(self._compile(piece, planned, options, trusted), None, False)
        digest, fields = name
        if (found := self._load(self.store, digest, piece, planned)) is not None:
            return Result(found, digest, True)
        with self.store.lock(digest) as held:
            found = self._load(self.store, digest, piece, planned) if held else None
            if found is not None:
                return Result(found, digest, True)
            compiled = self._compile(piece, planned, options, trusted)
            kept = compiled.bare is not None and artifact.keep(
                self.store,
                digest,
                fields,
                compiled.bare.wrapper,
                compiled.bare.kernels,
                {
                    "assumptions": [[a.code, a.origin] for a in compiled.assumptions],
                    "matches": [m.kept() for m in compiled.matches],
                    "steps": compiled.bare.steps,
                },
            )
        return Result(compiled, digest if kept else None, False)

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
        found = artifact.load(store, digest, self.kernels)
        if found is None:
            return None
        return read_artifact(found, piece.fingerprint, planned.range)


def read_artifact(found: artifact.Artifact, fingerprint: str, range_: Range) -> inductor.Compiled:
    """A kept piece as the compiler would have returned it."""
    assumptions = tuple(Assumption(code, origin) for code, origin in found.entry["assumptions"])
    matches = tuple(MatchCount.from_kept(m, fingerprint, range_) for m in found.entry["matches"])
    steps = inductor.piece_steps(found.entry["steps"], found.kernels)
    return inductor.Compiled(found.call, assumptions, matches, steps=steps)
