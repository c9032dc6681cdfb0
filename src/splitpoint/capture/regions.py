"""Cover all sizes with captures: one, unless the model itself branches on the size."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..errors import CaptureError, SideEffect, SizeSpecialized, UnsupportedGraph
from .assumptions import failing, runs, valid
from .capture import Capture
from .dims import Dims, Lengths

log = logging.getLogger("splitpoint")

CaptureAt = Callable[[Lengths, Collection[int]], Capture]
"""Captures for lengths of dynamic dimensions, of which these (by index) stay symbolic."""

MOST_CAPTURES = 8
"""A model that needs more graphs than this for its sizes depends on the size as such."""


@dataclass(frozen=True)
class Regions:
    """Which capture is right at which size."""

    captures: tuple[Capture, ...]
    owner: array[int]
    """`owner[size]` is 1 + the index of the size's capture; 0 where the model refuses."""
    boundaries: dict[int, str]
    """Why a size and the one before it have different owners, by size."""
    refusals: tuple[str, ...]
    """Why the model refuses the sizes that it does, as eager PyTorch would."""


def cover_some(capture_at: CaptureAt, dims: Dims, first: Lengths, max_size: int) -> Regions:
    """Capture at the first call's lengths of several dimensions, and where samples of all others
    show that this graph is not valid. What no sample shows is captured when it is called.

    Raises:
        CaptureError: when the first capture fails.
        SizeSpecialized: when more than `MOST_CAPTURES` graphs would be needed.
    """
    captures: list[Capture] = []
    refusals: dict[str, None] = {}
    for lengths in dims.samples(first, max_size):
        if any(captured.serves(lengths) for captured in captures):
            continue
        try:
            captures.append(capture_for(capture_at, captures, lengths))
        except (SideEffect, UnsupportedGraph, SizeSpecialized):
            raise
        except CaptureError as error:
            if not captures:
                raise
            refusals[_refusal(captures, lengths, error)] = None
    return Regions(tuple(captures), array("H"), {}, tuple(refusals))


def capture_for(capture_at: CaptureAt, captures: Sequence[Capture], lengths: Lengths) -> Capture:
    """Capture for lengths of several dimensions that no capture serves.

    Raises:
        CaptureError: when there is no graph.
        SizeSpecialized: when there are `MOST_CAPTURES` graphs already.
    """
    if len(captures) >= MOST_CAPTURES:
        broken = dict.fromkeys(str(a) for c in captures for a in failing(c.assumptions, *lengths))
        raise SizeSpecialized(
            f"the model's graph depends on its dynamic dimensions themselves: {len(captures)} "
            f"graphs do not cover {lengths}. They need {'; '.join(broken)}. Keep them out of "
            f"Python control flow, loops and constants"
        )
    made = _capture(capture_at, lengths, dynamic=True)
    if not made.serves(lengths):
        raise SizeSpecialized(
            f"the graph captured for {lengths} is not valid there: "
            + "; ".join(map(str, failing(made.assumptions, *lengths)))
        )
    return made


def cover(capture_at: CaptureAt, first_size: int, max_size: int) -> Regions:
    """Capture at the first size, then at whatever sizes that graph is not valid for.

    A size at which there is no graph for all sizes like it may have one for itself alone
    (Python code such as `n > 1 and ...` gives a symbol where an operator wants a bool). One
    that has neither, although `first_size` has, is refused by the model itself (a view that
    does not divide, say), and with it all sizes at which the same conditions fail.

    Args:
        capture_at: captures at a size, for all sizes like it or it alone.
        first_size: a size that the model is known to take.
        max_size: the largest size to cover.

    Raises:
        CaptureError: when the first capture fails.
        SizeSpecialized: when more than `MOST_CAPTURES` graphs would be needed.
    """
    owner = array("H", bytes(2 * (max_size + 1)))
    captures: list[Capture] = []
    refusals: list[str] = []
    left = list(range(1, max_size + 1))
    attempts = 0
    size = first_size
    while left:
        attempts += 1
        if attempts > MOST_CAPTURES:
            raise SizeSpecialized(_too_many(captures, left))
        try:
            captured = _capture(capture_at, (size,), dynamic=len(left) > 1)
        except (SideEffect, UnsupportedGraph):
            raise
        except CaptureError as error:
            if not captures:
                raise
            pattern = _pattern(captures, size)
            gone = {s for s in left if _pattern(captures, s) == pattern}
            refusals.append(_refusal(captures, (size,), error))
            log.info("the model refuses %d sizes: %s", len(gone), refusals[-1])
        else:
            captures.append(captured)
            served = valid(captured.assumptions, left)
            if size not in served:
                raise SizeSpecialized(
                    f"the graph captured at size {size} is not valid there: "
                    + "; ".join(map(str, failing(captured.assumptions, size)))
                )
            for s in served:
                owner[s] = len(captures)
            gone = set(served)
        left = [s for s in left if s not in gone]
        if left:
            size = left[0]
    return Regions(tuple(captures), owner, _boundaries(captures, owner), tuple(refusals))


def _capture(capture_at: CaptureAt, lengths: Lengths, dynamic: bool) -> Capture:
    """Capture with as many symbols as there is a graph for: all dimensions, those that are longer
    than 1, or none."""
    every = range(len(lengths)) if dynamic else ()
    longer = [index for index in every if lengths[index] > 1]
    first: CaptureError | None = None
    last: Capture | None = None
    for symbolic in dict.fromkeys((tuple(every), tuple(longer), ())):
        try:
            made = capture_at(lengths, symbolic)
        except (SideEffect, UnsupportedGraph):
            raise
        except CaptureError as error:
            first = first or error
            continue
        # What is captured at a length of 1 for all lengths may be right at longer ones alone.
        if made.serves(lengths) or not symbolic:
            return made
        last = made
    if last is not None:
        return last
    assert first is not None
    raise first


def _refusal(captures: list[Capture], lengths: Lengths, error: CaptureError) -> str:
    conditions = "; ".join(str(a) for c in captures for a in failing(c.assumptions, *lengths))
    return f"{_reason(error)} (the model needs {conditions})"


def _reason(error: CaptureError) -> str:
    """What the operator that failed said, out of Dynamo's explanation."""
    text = str(error)
    said = re.search(r"got \w+\((['\"])(.*?)\1\)", text)
    return said[2] if said else text.splitlines()[0]


def _pattern(captures: list[Capture], size: int) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(a.holds(size) for a in c.assumptions) for c in captures)


def _boundaries(captures: list[Capture], owner: array[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for size in range(2, len(owner)):
        before, here = owner[size - 1], owner[size]
        if before != here:
            broken = failing(captures[before - 1].assumptions, size) if before else []
            broken += failing(captures[here - 1].assumptions, size - 1) if here else []
            # The model's own condition says more than that a graph is for one size alone.
            known = [a for a in broken if a.origin] or broken
            found[size] = str(known[0]) if known else ""
    return found


def _too_many(captures: list[Capture], left: list[int]) -> str:
    broken = [a for c in captures for a in c.assumptions if not a.holds(left[0])]
    users = [a for a in broken if ":" in a.origin] or broken  # those with a line of code
    conditions = dict.fromkeys(map(str, users))
    uncovered = ", ".join(f"[{a},{b}]" for a, b in runs(left)[:3])
    return (
        f"the model's graph depends on the size itself: {len(captures)} graphs do not cover "
        f"{uncovered}... They need {'; '.join(conditions)}. Keep the size out of Python "
        f"control flow, loops and constants"
    )
