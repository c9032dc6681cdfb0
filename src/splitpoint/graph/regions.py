"""Cover all sizes with captures: one, unless the model itself branches on the size."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CaptureError, SideEffect, SizeSpecialized, UnsupportedGraph
from .assumptions import failing, runs, valid
from .capture import Capture

log = logging.getLogger("splitpoint")

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


def cover(capture_at: Callable[[int, bool], Capture], first_size: int, max_size: int) -> Regions:
    """Capture at the first size, then at whatever sizes that graph is not valid for.

    A size at which there is no graph for all sizes like it may have one for itself alone
    (Python code such as `n > 1 and ...` gives a symbol where an operator wants a bool). One
    that has neither, although `first_size` has, is refused by the model itself (a view that
    does not divide, say), and with it all sizes at which the same conditions fail.

    Args:
        capture_at: captures at a size, for all sizes like it (True) or it alone (False).
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
            captured = _capture(capture_at, size, dynamic=len(left) > 1)
        except (SideEffect, UnsupportedGraph):
            raise
        except CaptureError as error:
            if not captures:
                raise
            pattern = _pattern(captures, size)
            gone = {s for s in left if _pattern(captures, s) == pattern}
            refusals.append(_refusal(captures, size, error))
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


def _capture(capture_at: Callable[[int, bool], Capture], size: int, dynamic: bool) -> Capture:
    if not dynamic:
        return capture_at(size, False)
    try:
        return capture_at(size, True)
    except (SideEffect, UnsupportedGraph):
        raise
    except CaptureError as error:
        try:
            return capture_at(size, False)
        except CaptureError:
            raise error from None


def _refusal(captures: list[Capture], size: int, error: CaptureError) -> str:
    conditions = "; ".join(str(a) for c in captures for a in failing(c.assumptions, size))
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
