"""Compiled artifacts on disk: compile once, start anywhere at the speed of reading files."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ..config import Config
from ..errors import UntrustedStore
from ..paths import store_folder
from .store import Store

log = logging.getLogger("splitpoint")


def open_store(config: Config) -> Store | None:
    """The store that a configuration names; None where it names none, or one that others could
    write to or exchange, which is said in the log."""
    if config.cache_dir == "" or sys.platform == "win32":
        return None
    folder = store_folder() if config.cache_dir is None else Path(config.cache_dir).expanduser()
    store = Store(folder.absolute())
    try:
        store.check_trust()
    except UntrustedStore as error:
        log.warning("store: not used: %s", error)
        return None
    return store
