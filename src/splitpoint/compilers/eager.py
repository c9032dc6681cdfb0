"""The reference: run each piece as captured, uncompiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..graph.pieces import Piece


def compile_piece(piece: Piece) -> Callable[..., Sequence[Any]]:
    """The piece's own graph; called like a compiled one."""
    forward: Callable[..., Sequence[Any]] = piece.graph_module.forward
    return forward
