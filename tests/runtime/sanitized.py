"""A pytest plugin: the runner and the watch come from the library that `SANITIZED` names."""

from __future__ import annotations

import os
from pathlib import Path

from splitpoint import kernels

# What the tests start themselves (g++) need not be watched.
os.environ.pop("LD_PRELOAD", None)
kernels.load()
kernels._loaded[:] = [Path(os.environ["SANITIZED"])]
