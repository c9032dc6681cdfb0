"""`torch.compile(dynamic=True)` in a process of its own, which can be ended when time is up."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import BaselineFailed
from ..models.catalogue import DTYPES, load
from ..tuning.measure import clock_for
from .inputs import last_logits


class CompiledElsewhere:
    """A model compiled by `torch.compile(dynamic=True)` in another process, as a context."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        """Starts it; the model loads meanwhile."""
        task = {"model": model, "dtype": dtype, "threads": threads}
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "splitpoint.bench.demo_worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def call(self, ids: Tensor, timeout_s: float | None = None) -> tuple[Tensor, float] | None:
        """The logits [1, vocabulary] of the last of `ids` [1, size], and seconds that the call
        took; None when it is not done in time, after which there is no process any more.

        Raises:
            BaselineFailed: when the process ended by itself.
        """
        out = Path(self._folder.name) / "logits.pt"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"ids": ids[0].tolist(), "out": str(out)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BaselineFailed("torch.compile's process ended by itself") from None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(None if timeout_s is None else max(timeout_s, 0.0)):
                self.close()
                return None
        line = self._process.stdout.readline()
        if not line:
            raise BaselineFailed("torch.compile's process ended by itself")
        return torch.load(out), float(json.loads(line)["seconds"])

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> CompiledElsewhere:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # what it was last asked, and did not read
                continue
        self._folder.cleanup()


def main(task: dict[str, Any]) -> None:
    """Answer calls, a line of JSON each, until there are no more."""
    torch.set_num_threads(task["threads"])
    model, _ = load(task["model"], DTYPES[task["dtype"]])
    forward = last_logits(torch.compile(model, dynamic=True, fullgraph=True))
    clock = clock_for(task["threads"])
    for line in sys.stdin:
        call = json.loads(line)
        ids = torch.tensor([call["ids"]])
        start = clock.read()
        logits = forward(ids)
        seconds = clock.read() - start
        torch.save(logits, call["out"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
