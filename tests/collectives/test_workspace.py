"""Attaching: where the memory comes from, who is refused, and that nothing is left behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from splitpoint.collectives import workspace
from splitpoint.errors import WorkspaceError
from tests.collectives import calls
from tests.collectives.ranks import Ranks, attach_with, detach

pytestmark = pytest.mark.processes

ONE_EACH = [[("fused", {}), ("reduced", {})]] * 2


@pytest.fixture
def bare() -> Any:
    """Two processes of a group without a workspace."""
    with Ranks(2) as ranks:
        yield ranks


def refused(by_rank: list[dict[str, Any]]) -> str:
    with pytest.raises(WorkspaceError) as caught:
        workspace.attach(**by_rank[dist.get_rank()])
    return str(caught.value)


def prepare(limit: int | None = None) -> None:
    if limit and dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def in_context() -> list[bool]:
    with workspace.attach(timeout_s=20) as made:
        seen = [made.attached, (made.rank, made.ranks) == (dist.get_rank(), 2)]
        torch.ops.splitpoint.all_reduce(torch.ones(3), group=made.group)
    made.detach()
    return [*seen, not made.attached]


def test_attached_inside_a_context(bare: Ranks) -> None:
    assert bare.run(in_context) == [[True, True, True]] * 2
    assert bare.run(in_context) == [[True, True, True]] * 2


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"max_bytes": 0}, {}, "rank 0: max_bytes must be from 1 to 2**30, got 0"),
        ({}, {"timeout_s": -1.0}, "rank 1: timeout_s must be a positive number"),
        (
            {"max_bytes": 8192},
            {"max_bytes": 4096},
            "attach with different max_bytes: 8192 and 4096",
        ),
    ],
)
def test_refused_on_all_ranks(
    bare: Ranks, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    messages = bare.run(refused, [first, second])
    assert said in messages[0]
    assert messages[0] == messages[1]
    assert bare.run(in_context) == [[True, True, True]] * 2


def test_a_second_workspace_is_refused(bare: Ranks) -> None:
    bare.run(attach_with, {})
    for said in bare.run(refused, [{}, {}]):
        assert "rank 1: it has a workspace already: detach that one first" in said
    assert [each.error for each in bare.run(calls.make, ONE_EACH)] == ["", ""]


def test_too_little_memory_is_refused_on_all_ranks(bare: Ranks) -> None:
    bare.run(prepare, 1 << 20)
    for said in bare.run(refused, [{}, {}]):
        assert "rank 0: " in said


def give_up_privileges() -> None:
    """Become a user whose processes may not look into each other, with the kernels at hand."""
    from splitpoint.collectives import shm

    shm.load()
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.skipif(os.getuid() != 0, reason="changes its user")
def test_the_file_is_handed_over_where_proc_is_closed(bare: Ranks) -> None:
    bare.run(give_up_privileges)
    opened = bare.run(proc_is_open, [process.pid for process in bare.processes])
    assert opened == [False, False]
    bare.run(attach_with, {})
    assert [each.error for each in bare.run(calls.make, ONE_EACH)] == ["", ""]


def proc_is_open(pids: list[int]) -> bool:
    return os.access(f"/proc/{pids[1 - dist.get_rank()]}/fd", os.R_OK | os.X_OK)


def test_nothing_is_left_behind(fresh: Callable[..., Ranks]) -> None:
    def named() -> set[str]:
        sockets = Path("/proc/net/unix").read_text().splitlines()
        return {*os.listdir("/dev/shm"), *(line for line in sockets if "splitpoint" in line)}

    before = named()
    ranks = fresh(2)
    assert named() <= before
    pids = [process.pid for process in ranks.processes]
    open_files = ranks.run(descriptors)
    assert not any("memfd" in each for files in open_files for each in files)
    ranks.start(calls.die)
    for process in ranks.processes:
        process.join()
    assert named() <= before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def descriptors() -> list[str]:
    folder = Path("/proc/self/fd")
    # The one that lists the folder is gone when it is looked at.
    return [os.readlink(each) for each in folder.iterdir() if each.is_symlink()]


def call_in_child() -> str:
    """What the operator says in a fork of this rank."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, calls.make([[("reduced", {})]] * 2).error.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(read, 1000).decode()


def test_a_fork_of_a_rank_is_no_rank(fresh: Callable[..., Ranks]) -> None:
    ranks = fresh(2)
    for said in ranks.run(call_in_child):
        assert "this process was forked after its workspace was attached" in said
    assert [each.error for each in ranks.run(calls.make, ONE_EACH)] == ["", ""]
    ranks.run(detach)
