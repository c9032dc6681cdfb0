"""What `splitpoint demo` measured: rates of two answers, times by size, the picture of both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..ranges import Plan, align
from .forward_report import Measured
from .picture import TITLES, plots

EAGER, COMPILED, OURS = "eager", "torch.compile", "splitpoint"


@dataclass(frozen=True)
class DemoRow:
    """One size."""

    size: int
    measured: Mapping[str, Measured]
    """By name; without what was left out at this size."""
    floor_ms: float | None
    """The least that the size can take; None where memory could not be read."""


@dataclass(frozen=True)
class DemoReport:
    """The outcome of the comparison; `print` it for the table."""

    environment: dict[str, Any]
    rates: Mapping[str, float]
    """Tokens a second of the answer, by name."""
    rows: tuple[DemoRow, ...]
    notes: tuple[str, ...]
    """What was left out, and why."""
    plan: Plan

    def to_json(self) -> str:
        """`{"environment": ..., "rates": ..., "rows": ..., "notes": ...}`."""
        rows = [asdict(row) for row in self.rows]
        found = {"environment": self.environment, "rates": dict(self.rates), "rows": rows}
        return json.dumps({**found, "notes": list(self.notes)}, indent=2)

    def setting(self) -> str:
        """Model, dtype and threads, in a few words."""
        env = self.environment
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        return f"{env['model']}, {env['dtype']}, {threads}"

    def __str__(self) -> str:
        names = (EAGER, COMPILED, OURS)
        heading = ("size", *(f"{name} ms" for name in names), "eager over ours", "of floor")
        cells = []
        for row in self.rows:
            ours = row.measured[OURS].ms
            times = [f"{row.measured[n].ms:.2f}" if n in row.measured else "-" for n in names]
            share = "" if row.floor_ms is None else f"{row.floor_ms / ours:.0%}"
            ratio = row.measured[EAGER].ms / ours
            cells.append((str(row.size), *times, f"{ratio:.2f}x", share))
        env = self.environment
        return "\n".join(
            [
                f"Forward pass of {self.setting()}, {env['clock']}, medians of a few calls",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *align([heading, *cells], right=range(len(heading))),
                *self.notes,
            ]
        )

    def save_picture(self, path: Path) -> None:
        """Write the answers' rates and the curves as PNG.

        Raises:
            UsageError: when matplotlib is not installed.
        """
        series = {
            TITLES.get(name, name): [
                row.measured[name].ms if name in row.measured else math.nan for row in self.rows
            ]
            for name in (EAGER, COMPILED, OURS)
        }
        floor = [math.nan if row.floor_ms is None else row.floor_ms for row in self.rows]
        plots().save_curves(
            path,
            [row.size for row in self.rows],
            series,
            self.plan,
            floor=None if all(map(math.isnan, floor)) else floor,
            title=f"{self.setting()}: answering, and a forward pass by its size",
            bars={TITLES.get(name, name): rate for name, rate in self.rates.items()},
        )
