"""The picture of a `ForwardReport`."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from ..errors import UsageError
from .forward import ForwardReport


def save_picture(report: ForwardReport, path: Path) -> None:
    """Write the three curves as PNG.

    Raises:
        UsageError: when matplotlib is not installed.
    """
    plots().save_curves(
        path,
        [row.size for row in report.rows],
        {
            "eager": [row.eager_ms for row in report.rows],
            "torch.compile(dynamic=True)": [row.torch_compile_ms for row in report.rows],
            "splitpoint": [row.splitpoint_ms for row in report.rows],
        },
        report.plan,
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
