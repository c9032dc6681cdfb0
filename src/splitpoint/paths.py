"""Where files that outlive a run are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder for files that can be made again: `SPLITPOINT_CACHE`, or the platform's own.

    The platform's own is `$XDG_CACHE_HOME/splitpoint` (`~/.cache/splitpoint` when unset),
    `~/Library/Caches/splitpoint` on macOS and `%LOCALAPPDATA%\\splitpoint` on Windows. The
    folder need not exist yet.
    """
    if given := os.environ.get("SPLITPOINT_CACHE"):
        return Path(given).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "splitpoint"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "splitpoint"
        )
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification asks that a relative path be ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "splitpoint"


def store_folder() -> Path:
    """The folder of compiled artifacts, unless a `Config` names another."""
    return cache_folder() / "store"
