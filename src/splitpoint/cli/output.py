"""What the verbs print and write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol


class Report(Protocol):
    """What a measurement gives: `print` it for the tables."""

    def to_json(self) -> str:
        """All that was measured."""


def show(report: Report, path: Path | None) -> None:
    """Print a report, and write it as JSON if asked to."""
    print(report)
    if path:
        path.write_text(report.to_json() + "\n")


def say(line: str) -> None:
    """Say what goes on, beside the results."""
    print(line, file=sys.stderr, flush=True)
