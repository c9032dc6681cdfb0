"""Start processes of this host as ranks of a process group, and have them run a function."""

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

from ..errors import RankFailed, SplitpointError

_GRACE_S = 5.0
"""How long processes that are done may take to end by themselves."""


def run_ranks(count: int, threads: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(*args) returns on each of `count` new processes, in rank order.

    They are the default process group, over gloo, with `threads` intra-op threads each, and end
    when this process does. The function, its arguments and its results must pickle: a function
    of a module.

    Raises:
        SplitpointError: what a rank raised of that kind.
        RankFailed: naming the first rank that raised anything else or died. The others are ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="splitpoint-ranks-") as folder:
        ranks: list[tuple[Any, Connection]] = []
        try:
            for rank in range(count):
                here, there = context.Pipe()
                process = context.Process(
                    target=_rank,
                    args=(there, folder, rank, count, threads, function, args),
                    daemon=True,
                )
                process.start()
                there.close()
                ranks.append((process, here))
            return _gather(ranks)
        finally:
            for process, here in ranks:
                process.join(_GRACE_S if sys.exc_info()[0] is None else 0.2)
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
                process.join(_GRACE_S)
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
    count: int,
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
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
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
