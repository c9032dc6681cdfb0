"""What recording a function on a device takes of the device, and that of CUDA.

Not run on hardware: nothing here had a GPU to run on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Replay = Callable[[], object]


class GraphDevice(Protocol):
    """The operations of a device that record what a function launches, and launch it again.

    What is recorded reads and writes the memory that it did when it was recorded.
    """

    def new_pool(self) -> Any:
        """Memory for what recorded functions allocate. One pool is for recordings that are replayed
        one at a time: what one has freed may be memory of the next."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Call a function, whose first calls may do what cannot be recorded: choose kernels, load
        code, make workspaces."""

    def record(self, run: Callable[[], Any], pool: Any) -> tuple[Replay, Any]:
        """Record a call; what replays it, and what the function returned, whose tensors each replay
        writes anew.

        Raises:
            RuntimeError: when the function does what cannot be recorded.
        """

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time of a call, until all that it launched is done."""

    def follow(self, last: Any) -> Any:
        """Have what is launched now come after what was launched in `last`, which an earlier call
        returned (None at first); returns where things are launched now."""


class CudaGraphs:
    """CUDA graphs, by torch's public interface."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_pool(self) -> Any:
        """See `GraphDevice`."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """See `GraphDevice`: on a stream of its own, as torch's documentation asks for."""
        with torch.cuda.device(self._device):
            now = torch.cuda.current_stream()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(now)
            with torch.cuda.stream(side):
                run()
            now.wait_stream(side)

    def record(self, run: Callable[[], Any], pool: Any) -> tuple[Replay, Any]:
        """See `GraphDevice`."""
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` waits for the device, and captures on a stream of its own.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=pool):
            result = run()
        return graph.replay, result

    def seconds(self, run: Callable[[], object]) -> float:
        """See `GraphDevice`."""
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def follow(self, last: Any) -> Any:
        """See `GraphDevice`: streams."""
        now = torch.cuda.current_stream(self._device)
        if last is not None and last != now:
            now.wait_stream(last)
        return now
