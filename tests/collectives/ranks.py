"""Processes as ranks: they join a process group once and then run one function after another."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_S = 120.0


class RankFailed(AssertionError):
    """A function raised in a rank; the message is its traceback."""


class Ranks:
    """`count` processes of one gloo group. What is run must be a function of a module."""

    def __init__(self, count: int) -> None:
        # A server that has imported torch forks them, which takes milliseconds, and its own state
        # is as clean as a new process's.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.collectives.ranks", "torch.distributed"])
        self.count = count
        self.failed = False
        """Whether a function raised, or a rank is gone: answers of others may lie unread."""
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        self.processes = []
        self._pipes: list[Connection] = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(store), there))
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)

    def start(
        self, function: Callable[..., Any], *args: Any, ranks: list[int] | None = None
    ) -> None:
        """Have ranks call function(*args)."""
        for rank in range(self.count) if ranks is None else ranks:
            self._pipes[rank].send((function, args))

    def result(self, rank: int, timeout_s: float = PATIENCE_S) -> Any:
        """What a rank's function returned.

        Raises:
            RankFailed: when it raised, died, or took too long.
        """
        before, self.failed = self.failed, True
        if not self._pipes[rank].poll(timeout_s):
            raise RankFailed(f"rank {rank} did not answer within {timeout_s} s")
        try:
            good, value = self._pipes[rank].recv()
        except EOFError:
            raise RankFailed(f"rank {rank} died") from None
        if not good:
            raise RankFailed(f"rank {rank}: {value}")
        self.failed = before
        return value

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(*args) returns on each rank."""
        self.start(function, *args)
        return [self.result(rank) for rank in range(self.count)]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(2)
            process.kill()
            process.join()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            answer = (True, function(*args))
        except Exception:  # noqa: BLE001 - whatever it is, the test is told
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except BrokenPipeError:
            break
    os._exit(0)


# --- functions to run ------------------------------------------------------------------


def attach(**settings: Any) -> str:
    """Attach a workspace to the default group; returns the group's name."""
    from splitpoint.collectives import workspace

    return workspace.attach(**settings).group


def attach_with(settings: dict[str, Any]) -> str:
    return attach(**settings)


def meet() -> None:
    from splitpoint.torch_internals.distributed import group_name

    torch.ops.splitpoint.all_reduce(torch.ones(1), group=group_name(dist.group.WORLD))


def detach() -> None:
    from splitpoint.torch_internals.distributed import group_name

    torch.ops.splitpoint.shm_detach(group_name(dist.group.WORLD))
