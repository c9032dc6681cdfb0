"""What a graph assumed about the size, evaluated at every size it is meant to serve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .. import _torch

Runs = tuple[tuple[int, int], ...]
"""Sizes as ascending runs (first, last), both included."""


@dataclass(frozen=True)
class Assumption:
    """A condition on the size that a graph needs to be right."""

    code: str
    """Python over `size`, for example `size <= 4096`."""
    origin: str
    """Where it comes from: the user's line where known."""

    @cached_property
    def holds(self) -> Callable[[int], bool]:
        """Whether the condition holds at a size."""
        function: Callable[[int], bool] = eval(  # the source is printed from sympy
            f"lambda size: bool({self.code})", {"math": math}
        )
        return function

    def __str__(self) -> str:
        return f"{self.code} ({self.origin})" if self.origin else self.code


def read(assumed: Sequence[_torch.Assumed]) -> tuple[Assumption, ...]:
    """Assumptions in a form that can be evaluated, printed and kept."""
    return tuple(Assumption(_torch.python_code(a.expr), a.origin) for a in assumed)


def failing(assumptions: Sequence[Assumption], size: int) -> list[Assumption]:
    """The assumptions that do not hold at a size."""
    return [a for a in assumptions if not a.holds(size)]


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
