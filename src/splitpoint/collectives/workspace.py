"""Workspaces: the shared memory that lets a process group's ranks, on one host, meet.

    with attach(dist.group.WORLD) as workspace:
        torch.ops.splitpoint.all_reduce(x, group=workspace.group)

Attaching is a collective call of all ranks; it is done outside of graphs and passes, which only
name the group. The memory has no name: rank 0 makes an anonymous file (memfd) and the others open
it through /proc, or are handed it over a socket where that is forbidden. When the processes end,
however they end, it is gone.
"""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist

from ..errors import KernelBuildError, WorkspaceError
from ..torch_internals import distributed
from . import shm
from .policy import QUANTS, Key, seed_policy, spelled

T = TypeVar("T")

MOST_RANKS = 8

MAX_BYTES = 128 << 10
"""Inputs up to this many bytes go through in one piece, by default: small enough for the pieces on
their way to stay in the second-level cache, large enough for a row of 8192 float32 values."""

_PAGE = 4096

_PROBE_BYTES = 64 << 10

_CLEARLY = 1.3
"""How much better writing past the caches must be; a busy machine must not decide for it."""

_HANDOVER_S = 10.0
"""How long ranks wait for each other while the file is handed over."""


@dataclass(frozen=True)
class Patience:
    """How a rank waits for the others: it looks again and again, then lets others run between
    looks, and sleeps in the kernel after that."""

    spin_s: float
    yield_s: float


OWN_CORE = Patience(spin_s=100e-6, yield_s=1e-3)
SHARED_CORE = Patience(spin_s=2e-6, yield_s=200e-6)
"""When there are more ranks than cores, the one that is waited for may need this one's core."""


class Workspace:
    """A group's shared memory, from `attach` until `detach`; also a context manager."""

    def __init__(self, group: str, rank: int, ranks: int, max_bytes: int, timeout_s: float) -> None:
        self.group = group
        """The group's name: what the operators take."""
        self.rank = rank
        self.ranks = ranks
        self.max_bytes = max_bytes
        """Inputs up to this many bytes go through in one piece, larger ones in chunks."""
        self.timeout_s = timeout_s

    @property
    def attached(self) -> bool:
        """Whether calls of the group are served by this process's workspace."""
        answer: bool = torch.ops.splitpoint.shm_attached(self.group)
        return answer

    def detach(self) -> None:
        """Let the group's own collectives serve it again; harmless when repeated.

        Not a collective call: a rank that still calls over the workspace gets an error.
        """
        torch.ops.splitpoint.shm_detach(self.group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def is_attached(group: str) -> bool:
    """Whether calls of a group, by its name, are served by a workspace of this process."""
    return hasattr(torch.ops.splitpoint, "shm_attached") and bool(
        torch.ops.splitpoint.shm_attached(group)
    )


_TERMS = ("kernels", "max_bytes", "timeout_s")


@dataclass(frozen=True)
class _Rank:
    """What ranks tell each other before they share memory."""

    pid: int
    host: str
    cpus: frozenset[int]
    terms: tuple[str, int, float]
    """What must be alike; see `_TERMS`."""
    error: str | None


def attach(
    group: dist.ProcessGroup | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = 30.0,
) -> Workspace:
    """Serve a process group's collectives over shared memory from now on; all ranks call it.

    `group` is the default group when None. `max_bytes` is the largest input, in bytes, that goes
    through in one piece; memory for 8 of them is taken for each rank. A rank that does not take
    part in a call within `timeout_s` seconds makes it an error on all others; one that died does
    so within a second.

    Raises:
        WorkspaceError: on all ranks, when any of them cannot take part: it is on another host, its
            kernels cannot be built, there is too little memory, the arguments differ, or the group
            has a workspace already. The message says which rank and why.
    """
    if group is None:
        group = dist.group.WORLD
    if group is None:
        raise WorkspaceError("there is no default process group: call init_process_group() first")
    rank, ranks = group.rank(), group.size()
    name = distributed.group_name(group)
    own = _introduce(name, ranks, max_bytes, timeout_s)
    known = _exchange(own, group)
    _agree(known, name)
    slot_bytes = own.terms[1]
    with ExitStack() as stack:
        fd = _share_file(stack, group, known, slot_bytes)
        error = None
        try:
            _attach(name, fd, rank, known, slot_bytes, timeout_s)
        except (OSError, RuntimeError) as problem:
            error = str(problem)
        errors = _exchange(error, group)
    if any(errors):
        torch.ops.splitpoint.shm_detach(name)
        _raise(errors, name)
    if ranks > 1:
        _choose_copies(name, group)
    return Workspace(name, rank, ranks, slot_bytes, timeout_s)


def _introduce(name: str, ranks: int, max_bytes: int, timeout_s: float) -> _Rank:
    library, error = "", None
    if sys.platform != "linux":
        error = f"shared-memory collectives need Linux, and this is {sys.platform}"
    elif ranks > MOST_RANKS:
        error = f"the group has {ranks} ranks, and a workspace serves {MOST_RANKS} at most"
    elif not 0 < max_bytes <= 1 << 30:
        error = f"max_bytes must be from 1 to 2**30, got {max_bytes}"
    elif not (timeout_s > 0 and math.isfinite(timeout_s)):
        error = f"timeout_s must be a positive number of seconds, got {timeout_s}"
    else:
        try:
            library = shm.load().name
        except KernelBuildError as problem:
            error = str(problem)
        else:
            if torch.ops.splitpoint.shm_attached(name):
                error = "it has a workspace already: detach that one first"
    return _Rank(
        pid=os.getpid(),
        host=_host(),
        cpus=frozenset(os.sched_getaffinity(0)),
        terms=(library, -(-max_bytes // _PAGE) * _PAGE, timeout_s),
        error=error,
    )


def _host() -> str:
    """What differs between hosts and between containers that do not see each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError as problem:
        return f"{socket.gethostname()} ({problem})"


def _agree(known: list[_Rank], name: str) -> None:
    errors = [each.error for each in known]
    if any(errors):
        _raise(errors, name)
    for index, each in enumerate(known):
        if each.host != known[0].host:
            raise WorkspaceError(
                f"group {name!r}: ranks 0 and {index} are on different hosts or in containers that "
                f"do not share their processes: a workspace joins processes of one host"
            )
        for what, mine, theirs in zip(_TERMS, known[0].terms, each.terms, strict=True):
            if mine != theirs:
                raise WorkspaceError(
                    f"group {name!r}: ranks 0 and {index} attach with different {what}: {mine} and "
                    f"{theirs}"
                )


def _raise(errors: list[str | None], name: str) -> None:
    said = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
    raise WorkspaceError(f"no workspace could be attached to group {name!r}: {said}")


def _attach(
    name: str, fd: int, rank: int, known: list[_Rank], slot_bytes: int, timeout_s: float
) -> None:
    cores = len(frozenset[int]().union(*(each.cpus for each in known)))
    patience = OWN_CORE if len(known) <= cores else SHARED_CORE
    pidfds = [-1] * len(known)
    try:
        for peer, each in enumerate(known):
            if peer != rank:
                pidfds[peer] = os.pidfd_open(each.pid)
        torch.ops.splitpoint.shm_attach(
            name,
            fd,
            rank,
            [each.pid for each in known],
            pidfds,
            slot_bytes,
            timeout_s,
            patience.spin_s,
            patience.yield_s,
            _defaults(len(known)),
        )
    except (OSError, RuntimeError):
        for pidfd in filter(lambda pidfd: pidfd >= 0, pidfds):
            os.close(pidfd)
        raise


def _defaults(ranks: int) -> list[str]:
    """What "auto" stands for by quantisation: the seeds for any hidden size."""
    entries = (seed_policy().entry(Key("cpu", ranks, quant=quant)) for quant in QUANTS)
    return [spelled(entry.intervals) if entry else "one_shot" for entry in entries]


def _choose_copies(name: str, group: dist.ProcessGroup) -> None:
    """Find out how a rank best gives its inputs to the others on this machine.

    Writing through its caches is up to three times as fast on some processors; on others each
    cache line must first be taken back from the reader, and writing past the caches is.
    """
    splitpoint = torch.ops.splitpoint
    x = torch.zeros(_PROBE_BYTES, dtype=torch.uint8).view(torch.float32)
    seconds = {False: math.inf, True: math.inf}
    for _ in range(3):
        for past_caches in seconds:
            splitpoint.shm_copy_past_caches(name, past_caches)
            splitpoint.all_reduce(x, group=name, algorithm="one_shot")
            start = time.perf_counter()
            for _ in range(8):
                splitpoint.all_reduce(x, group=name, algorithm="one_shot")
            seconds[past_caches] = min(seconds[past_caches], time.perf_counter() - start)
    known = _exchange(seconds, group)
    slowest = {way: max(each[way] for each in known) for way in seconds}
    splitpoint.shm_copy_past_caches(name, slowest[True] * _CLEARLY < slowest[False])
    splitpoint.shm_count_anew(name)
    # Nobody may call before all have begun to count anew.
    dist.barrier(group)


# --- one file for all ranks ------------------------------------------------------------


def _share_file(
    stack: ExitStack, group: dist.ProcessGroup, known: list[_Rank], slot_bytes: int
) -> int:
    """A descriptor of the memory's file, closed with the stack.

    Raises:
        WorkspaceError: on all ranks, when one of them gets none.
    """
    name = distributed.group_name(group)
    fd, address, server, error = -1, b"", None, None
    if group.rank() == 0:
        try:
            fd = _make_file(len(known), slot_bytes)
            stack.callback(os.close, fd)
            server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            # An abstract address: it has no file, and goes with the socket.
            address = b"\0splitpoint-" + secrets.token_hex(16).encode()
            server.bind(address)
            server.listen(MOST_RANKS)
        except (OSError, RuntimeError) as problem:
            error = str(problem)
    made = _exchange((fd, address, error), group)
    if made[0][2]:
        _raise([each[2] for each in made], name)
    denied = None
    if group.rank() != 0:
        try:
            path = f"/proc/{known[0].pid}/fd/{made[0][0]}"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        except OSError as problem:
            denied = str(problem)
    refused = _exchange(denied, group)
    if any(refused):
        try:
            if server is not None:
                in_need = {each.pid for each, why in zip(known, refused, strict=True) if why}
                _hand_over(server, fd, in_need)
            elif denied:
                fd = _receive(made[0][1], known[0].pid)
                stack.callback(os.close, fd)
        except OSError as problem:
            error = f"{denied}; nor could it be handed over: {problem}" if denied else str(problem)
        errors = _exchange(error, group)
        if any(errors):
            _raise(errors, name)
    return fd


def _make_file(ranks: int, slot_bytes: int) -> int:
    fd = os.memfd_create("splitpoint", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = torch.ops.splitpoint.shm_bytes(ranks, slot_bytes)
        os.ftruncate(fd, size)
        try:
            # Taken now: a page that is missing later would kill whoever touches it.
            os.posix_fallocate(fd, 0, size)
        except OSError as problem:
            raise OSError(
                problem.errno, f"cannot take {size} bytes of memory: {problem.strerror}"
            ) from problem
        # Nor can anybody with a descriptor take it away.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        torch.ops.splitpoint.shm_initialise(fd, ranks, slot_bytes)
    except (OSError, RuntimeError):
        os.close(fd)
        raise
    return fd


def _hand_over(server: socket.socket, fd: int, waiting: set[int]) -> None:
    """Give the file to these processes, and to no other that found the address."""
    server.settimeout(_HANDOVER_S)
    while waiting:
        client, _ = server.accept()
        with client:
            pid = _peer_pid(client)
            if pid in waiting:
                socket.send_fds(client, [b"fd"], [fd])
                waiting.remove(pid)


def _receive(address: bytes, pid: int) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_HANDOVER_S)
        client.connect(address)
        if _peer_pid(client) != pid:
            raise OSError("another process than rank 0 answers")
        _, fds, _, _ = socket.recv_fds(client, 16, 1)
    if not fds:
        raise OSError("rank 0 closed the connection")
    return fds[0]


def _peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[:4], sys.byteorder)


def _exchange(value: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's value, in rank order."""
    values: list[T] = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
