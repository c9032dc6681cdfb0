"""`splitpoint bench linear`: the rows of one or more layers as a table, JSON and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Weights
from ..errors import UsageError
from ..kernels.int4 import PREFERRED_GROUPS, int4_group
from ..ranges import align
from ..report.environment import environment
from ..tuning.measure import clock_for
from .linear import LayerRow, measure_layer
from .picture import plots


@dataclass(frozen=True)
class LinearReport:
    """What one layer takes, size by size and variant by variant; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[LayerRow, ...]

    @property
    def sizes(self) -> list[int]:
        """The sizes timed, ascending."""
        return sorted({row.size for row in self.rows})

    @property
    def variants(self) -> list[str]:
        """The variants timed, in the order in which they are tried."""
        return list(dict.fromkeys(row.variant for row in self.rows))

    def row(self, size: int, variant: str) -> LayerRow | None:
        """The row of a variant at a size; None where it was not timed."""
        found = [row for row in self.rows if (row.size, row.variant) == (size, variant)]
        return found[0] if found else None

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`, times in milliseconds."""
        rows = [
            {
                "size": row.size,
                "n": row.n,
                "k": row.k,
                "dtype": row.dtype,
                "threads": row.threads,
                "variant": row.variant,
                "ms": row.timing.median_s * 1e3,
                "spread": row.timing.spread,
                "floor_ms": row.floor_s * 1e3,
                "floor_share": row.floor_share,
                "over_linear": row.over_linear,
                "over_onednn": row.over_onednn,
            }
            for row in self.rows
        ]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=2)

    def __str__(self) -> str:
        env = self.environment
        heading = (
            "size",
            *(f"{name} us" for name in self.variants),
            "best",
            "over linear",
            "floor",
        )
        cells = []
        for size in self.sizes:
            rows = [self.row(size, variant) for variant in self.variants]
            best = min((row for row in rows if row), key=lambda row: row.timing.median_s)
            cells.append(
                (
                    str(size),
                    *(f"{row.timing.median_s * 1e6:.1f}" if row else "-" for row in rows),
                    best.variant,
                    f"{best.over_linear:.2f}x",
                    f"{best.floor_share:.0%}",
                )
            )
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        right = {c for c in range(len(heading)) if heading[c] != "best"}
        return "\n".join(
            [
                f"{env['k']} -> {env['n']}, {env['dtype']}, {threads}, {env['clock']}",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *align([heading, *cells], right=right),
                "",
                "us a call, medians, each call on a weight that is not in a cache; floor: the",
                f"share of the memory bandwidth ({env['bandwidth_gb_s']:.1f} GB/s, the most that "
                "was seen in this run)",
                "that the best one reaches.",
            ]
        )


def run(
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    sizes: Sequence[int],
    threads: int,
    budget_s: float,
    weights: Weights | None = None,
) -> LinearReport:
    """Time a [n, k] layer; see `measure_layer`, whose errors it raises.

    Raises:
        UsageError: for a k that 4-bit weights do not divide into groups.
    """
    if weights == "int4" and int4_group(k) is None:
        groups = " or ".join(map(str, PREFERRED_GROUPS))
        raise UsageError(f"--weights int4 needs a K that {groups} divides, got {k}")
    rows = measure_layer(n, k, dtype, sizes, threads, weights=weights, budget_s=budget_s)
    return LinearReport(
        environment()
        | {
            "n": n,
            "k": k,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads,
            "clock": clock_for(threads).name,
            "budget_s": budget_s,
            "bandwidth_gb_s": max(row.weight_bytes / row.floor_s for row in rows) / 1e9,
        },
        tuple(rows),
    )


def save_picture(report: LinearReport, path: Path) -> None:
    """Write one curve a variant as PNG.

    Raises:
        UsageError: when matplotlib is not installed.
    """
    env = report.environment
    series = {}
    for variant in report.variants:
        rows = [report.row(size, variant) for size in report.sizes]
        series[variant] = [row.timing.median_s * 1e3 if row else float("nan") for row in rows]
    plots().save_curves(
        path,
        report.sizes,
        series,
        None,
        title=f"Linear layer {env['k']} -> {env['n']}, {env['dtype']}, threads: {env['threads']}",
    )
