"""What a graph assumed about the size, evaluated at every size it is meant to serve; of several
dimensions, at every call with lengths that were not seen before."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..torch_internals.assumptions import Assumed
from ..torch_internals.sizes import python_code

Runs = tuple[tuple[int, int], ...]
"""Sizes as ascending runs (first, last), both included."""


@dataclass(frozen=True)
class Assumption:
    """A condition on the dynamic dimensions that a graph needs to be right."""

    code: str
    """Python over their names, for example `size <= 4096`."""
    origin: str
    """Where it comes from: the user's line where known."""
    names: tuple[str, ...] = ("size",)
    """Of the dimensions."""

    @cached_property
    def holds(self) -> Callable[..., bool]:
        """Whether the condition holds for a length of each dimension."""
        function: Callable[..., bool] = eval(  # the source is printed from sympy
            f"lambda {', '.join(self.names)}: bool({self.code})", {"math": math}
        )
        return function

    def uses(self) -> set[str]:
        """Which of the dimensions it is about."""
        return {
            each.id for each in ast.walk(ast.parse(self.code)) if isinstance(each, ast.Name)
        } & {*self.names}

    def __str__(self) -> str:
        return f"{self.code} ({self.origin})" if self.origin else self.code


def read(assumed: Sequence[Assumed], names: tuple[str, ...] = ("size",)) -> tuple[Assumption, ...]:
    """Assumptions in a form that can be evaluated, printed and kept."""
    return tuple(Assumption(python_code(a.expr), a.origin, names) for a in assumed)


def failing(assumptions: Sequence[Assumption], *lengths: int) -> list[Assumption]:
    """The assumptions that do not hold at a size, or for lengths of several dimensions."""
    return [a for a in assumptions if not a.holds(*lengths)]


def valid(assumptions: Sequence[Assumption], sizes: Iterable[int]) -> list[int]:
    """The sizes at which every assumption holds, in the order given."""
    kept = list(sizes)
    for assumption in assumptions:
        holds = assumption.holds
        kept = [size for size in kept if holds(size)]
    return kept


def runs(sizes: Iterable[int]) -> Runs:
    """Ascending sizes as runs of consecutive ones."""
    found: list[tuple[int, int]] = []
    for size in sizes:
        if found and found[-1][1] == size - 1:
            found[-1] = (found[-1][0], size)
        else:
            found.append((size, size))
    return tuple(found)
