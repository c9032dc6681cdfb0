"""The picture of a `ForwardReport`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import ModuleType

from ..errors import UsageError
from .entrants import ONLY
from .forward_report import ForwardReport

TITLES = {"torch.compile": "torch.compile(dynamic=True)"}
"""What a curve is called where its name in the table is short."""


def save_picture(report: ForwardReport, path: Path) -> None:
    """Write the curves as PNG: what was compared, of single kernels the best, and the floor.

    Raises:
        UsageError: when matplotlib is not installed.
    """
    best = report.best_single
    names = dict.fromkeys(name for row in report.rows for name in row.measured)
    series = {
        TITLES.get(name, name): [
            row.measured[name].ms if name in row.measured else math.nan for row in report.rows
        ]
        for name in names
        if not name.startswith(ONLY) or name == f"{ONLY}{best}"
    }
    floor = [row.floor.ms if row.floor else math.nan for row in report.rows]
    plots().save_curves(
        path,
        [row.size for row in report.rows],
        series,
        report.plan,
        floor=None if all(map(math.isnan, floor)) else floor,
        title="Forward pass of " + report.setting(),
    )


def check_outputs(*, png: Path | None = None, json: Path | None = None) -> None:
    """Find out before the long work, not after it, that its results cannot be written.

    Raises:
        UsageError: when a folder does not exist or may not be written to, or a PNG is wanted
            and matplotlib is not installed.
    """
    for path in filter(None, (png, json)):
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"cannot write {path}: name a file in a folder that exists")
    if png:
        plots()


def plots() -> ModuleType:
    """The module that draws.

    Raises:
        UsageError: when matplotlib is not installed.
    """
    try:
        from ..report import plots
    except ImportError as error:
        raise UsageError("a PNG needs matplotlib: pip install 'splitpoint[cli]'") from error
    return plots
