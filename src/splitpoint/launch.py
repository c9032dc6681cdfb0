"""Start the ranks of a process group as processes of this host, and gather what they return."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .errors import RankFailed, SplitpointError

GRACE_S = 5.0
"""How long the other ranks may go on after one failed."""


def launch(
    world_size: int, function: Callable[..., Any], *args: Any, threads: int = 1
) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes that are the ranks of a gloo group.

    The function, its arguments and its results are pickled; each process has `threads` threads.

    Returns:
        The results, by rank.

    Raises:
        RankFailed: naming the first rank that raised or died, with its error. The others are
            stopped. An error of this package is raised as it is.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="splitpoint-ranks-") as folder:
        ranks: list[tuple[Any, Connection]] = []
        try:
            for rank in range(world_size):
                here, there = context.Pipe()
                process = context.Process(
                    target=_rank,
                    args=(there, folder, rank, world_size, threads, function, args),
                    daemon=True,
                )
                process.start()
                there.close()
                ranks.append((process, here))
            return _gather(ranks)
        finally:
            for process, here in ranks:
                process.join(GRACE_S if sys.exc_info()[0] is None else 0.2)
                if process.is_alive():
                    process.kill()
                    process.join()
                here.close()


def _gather(ranks: list[tuple[Any, Connection]]) -> list[Any]:
    results: dict[int, Any] = {}
    pending = {here: rank for rank, (_, here) in enumerate(ranks)}
    while pending:
        for ready in wait(list(pending)):
            assert isinstance(ready, Connection)
            rank = pending.pop(ready)
            try:
                done, value, text = pickle.loads(ready.recv_bytes())
            except EOFError:
                process = ranks[rank][0]
                process.join(GRACE_S)
                raise RankFailed(
                    f"rank {rank} died with exit code {process.exitcode} before it was done"
                ) from None
            if not done:
                if isinstance(value, SplitpointError):
                    raise value
                raise RankFailed(f"rank {rank} failed: {value}\n{text}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _rank(
    there: Connection,
    folder: str,
    rank: int,
    world_size: int,
    threads: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    threading.Thread(target=_exit_with_parent, args=(there,), daemon=True).start()
    # All ranks are on this host; gloo would look its name up otherwise, which may lead nowhere.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    try:
        address = (Path(folder) / "store").as_uri()
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
        result = function(*args)
        dist.destroy_process_group()
        _send(there, True, result)
    except SplitpointError as error:
        _send(there, False, error)
    except Exception as error:  # noqa: BLE001 (whatever it is, the parent raises it)
        _send(there, False, f"{type(error).__name__}: {error}", traceback.format_exc())


def _send(there: Connection, done: bool, value: Any, text: str = "") -> None:
    # By value: what torch registers for pipes would share memory that dies with this process.
    there.send_bytes(pickle.dumps((done, value, text)))


def _exit_with_parent(there: Connection) -> None:
    """End this process when the one that started it is gone; it never sends anything."""
    wait([there])
    os._exit(1)
