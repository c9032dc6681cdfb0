"""A device that records on CPU: what is replayed is the function itself, over the same memory.

It has what makes recordings go wrong on an accelerator: a replay reads the arguments and weights
where they lay when it was recorded, and writes results to where they were then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from splitpoint.kernels import devices


class Events(list[Any]):
    """What a device was asked for, in order."""


class CpuGraphs:
    """A `GraphDevice`."""

    def __init__(self, device: torch.device, events: Events) -> None:
        self.events = events
        self.pools = 0
        self.refused: set[int] = set()
        """Results of so many rows cannot be recorded."""
        self.slow: set[int] = set()
        """Replays for so many rows take longer than calls."""

    def new_pool(self) -> int:
        self.pools += 1
        self.events.append(("pool", self.pools))
        return self.pools

    def warm_up(self, run: Callable[[], Any]) -> None:
        self.events.append("warm up")
        run()

    def record(self, run: Callable[[], Any], pool: Any) -> tuple[Callable[[], object], Any]:
        # CUDA captures without running, so what is returned holds anything at first.
        result = run()
        leaves = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        rows = leaves[0].shape[0] if leaves[0].dim() else 0
        if rows in self.refused:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        self.events.append(("record", rows, pool))

        def replay() -> None:
            self.events.append(("replay", rows))
            again = [leaf for leaf in tree_flatten(run())[0] if isinstance(leaf, torch.Tensor)]
            for leaf, value in zip(leaves, again, strict=True):
                if leaf is not value:
                    leaf.copy_(value)

        return replay, result

    def seconds(self, run: Callable[[], object]) -> float:
        before = len(self.events)
        run()
        rows = [event[1] for event in self.events[before:] if event[0] == "replay"]
        del self.events[before:]
        return 2.0 if not rows else 3.0 if rows[0] in self.slow else 1.0

    def follow(self, last: Any) -> Any:
        self.events.append("follow")
        return "here"


def on_cpu(
    patch: pytest.MonkeyPatch, refused: set[int] | None = None, slow: set[int] | None = None
) -> Events:
    """Have the table say that this records on CPU; what it is asked for."""
    events = Events()

    def graphs(device: torch.device) -> CpuGraphs:
        made = CpuGraphs(device, events)
        made.refused = refused or set()
        made.slow = slow or set()
        return made

    row = dataclasses.replace(devices.DEVICES["cpu"], graphs=graphs)
    patch.setitem(devices.DEVICES, "cpu", row)
    return events
