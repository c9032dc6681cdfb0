"""What a compile step came to assume about the size, as read from its ShapeEnv."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .sizes import Symbols, in_terms_of_size

if TYPE_CHECKING:
    import sympy


@dataclass(frozen=True)
class Assumed:
    """One fact about the size that a compile step relied on, as read from a ShapeEnv."""

    expr: sympy.Basic
    origin: str


def read_assumptions(
    env: Any, symbols: Symbols, bounds: Mapping[sympy.Symbol, tuple[int, int]] | None = None
) -> list[Assumed]:
    """What a ShapeEnv came to assume of its size symbols, over those of the dynamic dimensions.

    Reads guards, replacements, deferred run-time asserts and narrowed intervals. `bounds`
    are the intervals the symbols started with, None for [0, infinity). Facts about other
    (unbacked) symbols stay in the graph as run-time asserts and are left out.
    """
    import sympy

    found: list[Assumed] = []

    def add(expr: sympy.Basic, origin: str) -> None:
        if isinstance(expr, bool):
            expr = sympy.sympify(expr)
        if expr.free_symbols and expr.free_symbols <= symbols.keys():
            expr = in_terms_of_size(expr, symbols)
            if expr is not sympy.true and all(expr != a.expr for a in found):
                found.append(Assumed(expr, origin))

    for guard in env.guards:
        add(guard.expr, _origin(str(guard.sloc)))
    for asserts in env.deferred_runtime_asserts.values():
        for entry in asserts:
            add(entry.expr, str(entry.msg))
    for symbol, replacement in env.replacements.items():
        if symbol in symbols:
            add(sympy.Eq(symbol, replacement), f"{symbol} was replaced by {replacement}")
    for symbol in [symbol for symbol, meaning in symbols.items() if meaning.is_Symbol]:
        interval = env.var_to_range.get(symbol)
        if interval is None:
            continue
        lower, upper = (0, None) if bounds is None else bounds[symbol]
        if interval.lower > lower:
            add(symbol >= interval.lower, "the compiler narrowed the interval")
        if isinstance(interval.upper, sympy.Integer) and (upper is None or interval.upper < upper):
            add(symbol <= interval.upper, "the compiler narrowed the interval")
    return found


def _origin(location: str) -> str:
    """`path:line in function` of `source line  # path:line in function (torch's own line)`."""
    user = re.search(r"# (\S+)(:\d+ in \S+)", location)
    return _whole(user[1]) + user[2] if user else location.strip().strip("()")


def _whole(path: str) -> str:
    """A path as it was before torch left out the folders it shares with torch itself: where that
    is the root alone, torch leaves out one character more."""
    ours = Path(torch.__file__).parents
    if os.path.isabs(path) or any((folder / path).exists() for folder in list(ours)[:-1]):
        return path
    found = glob.glob(f"/?{glob.escape(path)}")
    return found[0] if len(found) == 1 else path
