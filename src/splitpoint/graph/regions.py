"""Cover all sizes with captures: one, unless the model itself branches on the size."""

from __future__ import annotations

import logging
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


def cover(capture_at: Callable[[int], Capture], first_size: int, max_size: int) -> Regions:
    """Capture at the first size, then at whatever sizes that graph is not valid for.

    A size at which capture fails, although it succeeded at `first_size`, is one that the
    model itself refuses (a view that does not divide, say). Sizes at which the same
    conditions fail are refused with it.

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
            captured = capture_at(size)
        except (SideEffect, UnsupportedGraph):
            raise
        except CaptureError as error:
            if not captures:
                raise
            pattern = _pattern(captures, size)
            refused = [s for s in left if _pattern(captures, s) == pattern]
            first_line = str(error.__cause__ or error).strip().splitlines()[0]
            conditions = "; ".join(str(a) for a in failing(captures[0].assumptions, size))
            refusals.append(f"sizes such as {size}: {first_line} [{conditions}]")
            log.info("the model refuses %d sizes: %s", len(refused), refusals[-1])
            gone = set(refused)
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


def _pattern(captures: list[Capture], size: int) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(a.holds(size) for a in c.assumptions) for c in captures)


def _boundaries(captures: list[Capture], owner: array[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for size in range(2, len(owner)):
        before, here = owner[size - 1], owner[size]
        if before != here:
            broken = failing(captures[before - 1].assumptions, size) if before else []
            broken = broken or (failing(captures[here - 1].assumptions, size - 1) if here else [])
            found[size] = "; ".join(map(str, broken))
    return found


def _too_many(captures: list[Capture], left: list[int]) -> str:
    conditions = {str(a) for c in captures for a in c.assumptions if not a.holds(left[0])}
    uncovered = ", ".join(f"[{a},{b}]" for a, b in runs(left)[:3])
    return (
        f"the model's graph depends on the size itself: {len(captures)} graphs do not cover "
        f"{uncovered}... They need {'; '.join(sorted(conditions))}. Keep the size out of Python "
        f"control flow, loops and constants"
    )
