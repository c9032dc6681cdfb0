"""Decisions that all ranks of a group make alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ..errors import RanksDisagree, SplitpointError
from .measured import Measurement


def vote(group: dist.ProcessGroup, problem: str | None, error: type[SplitpointError]) -> None:
    """Go on where no rank has a problem. All ranks call it.

    Raises:
        error: on every rank, when one has a problem; with the first one's.
    """
    problems: list[str | None] = [None] * group.size()
    dist.all_gather_object(problems, problem, group=group)
    for rank, said in enumerate(problems):
        if said is not None:
            raise error(f"rank {rank}: {said}")


def same(group: dist.ProcessGroup, what: str, text: str) -> None:
    """Check that a text is the same on all ranks. All ranks call it.

    Raises:
        RanksDisagree: naming the first rank that has another than rank 0.
    """
    texts: list[str] = [""] * group.size()
    dist.all_gather_object(texts, text, group=group)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            raise RanksDisagree(
                f"rank {rank} has another {what} than rank 0: give all ranks the same"
            )


def slowest(group: dist.ProcessGroup, rows: Sequence[Measurement]) -> list[Measurement]:
    """The measurements with each time that of the slowest rank, in one order. All ranks call it.

    Raises:
        RanksDisagree: when they measured different things.
    """
    rows = sorted(rows, key=lambda row: (str(row.key), row.nbytes))
    labels = [(str(row.key), row.nbytes, [a for a, _ in row.seconds]) for row in rows]
    same(group, "list of measurements", repr(labels))
    times = torch.tensor([t for row in rows for _, t in row.seconds], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    agreed = iter(times.tolist())
    return [replace(row, seconds=tuple((a, next(agreed)) for a, _ in row.seconds)) for row in rows]
