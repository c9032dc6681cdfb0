"""Where a graph's inputs come from, and the leaves of what the callable returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """The call's `index`-th tensor argument."""

    index: int


@dataclass(frozen=True)
class Bound:
    """A tensor that the module holds (a parameter, a buffer, a tensor it closes over)."""

    index: int


@dataclass(frozen=True)
class SizeInput:
    """A graph input that is the size."""


@dataclass(frozen=True)
class GraphOutput:
    """A leaf of the result that the graph computes, by output index."""

    index: int


@dataclass(frozen=True)
class Integer:
    """A leaf of the result that is an integer which follows from the dynamic dimensions."""

    code: str
    """Python over their names."""


@dataclass(frozen=True)
class Shape:
    """A leaf of the result that is a `torch.Size`."""

    parts: tuple[GraphOutput | Integer | int, ...]
