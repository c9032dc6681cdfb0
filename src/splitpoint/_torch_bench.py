"""Private torch names that the benchmarks touch, each with the version it was checked on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from torch._inductor.utils import clear_caches  # torch 2.13


@contextmanager
def fresh_inductor_cache() -> Iterator[None]:
    """An empty Inductor cache inside the context, on disk and in memory; removed after it.

    Inductor has one of its own, which leaves the folder behind, and says so, when anything is
    raised inside it.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folders = {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        }
        clear_caches()
        try:
            with patch.dict(os.environ, folders):
                yield
        finally:
            clear_caches()
