"""Start processes of this host as ranks of a process group, and have them run a function."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RankFailed, SplitpointError

_GOODBYE_S = 10.0
"""How long processes that are done may take to end by themselves."""


def run_ranks(count: int, threads: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(*args) returns on each of `count` new processes, in rank order.

    They are the default process group, over gloo, with `threads` intra-op threads each. The
    function and its arguments must pickle: a function of a module.

    Raises:
        SplitpointError: what a rank raised of that kind.
        RankFailed: when a rank raised anything else, or died.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        pipes: list[Connection] = []
        processes: list[BaseProcess] = []
        try:
            for rank in range(count):
                here, there = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_run_rank,
                    args=(rank, count, threads, str(store), there, function, args),
                    daemon=True,
                )
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            results = _collect(pipes, processes)
            for process in processes:
                process.join(_GOODBYE_S)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[BaseProcess]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        for pipe in wait(list(waiting)):
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                error, results[rank] = pipe.recv()
            except EOFError:
                processes[rank].join()
                raise RankFailed(
                    f"rank {rank} (process {processes[rank].pid}) ended with exit code "
                    f"{processes[rank].exitcode} before it was done; what it wrote to standard "
                    f"error is above"
                ) from None
            if error is not None:
                raise error
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    rank: int,
    count: int,
    threads: int,
    store: str,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    try:
        pipe.send((None, function(*args)))
    except SplitpointError as error:
        pipe.send((error, None))
    dist.destroy_process_group()
