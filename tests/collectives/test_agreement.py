import pytest
import torch.distributed as dist

from splitpoint import errors
from splitpoint.collectives import agreement
from splitpoint.collectives.launch import run_ranks
from splitpoint.collectives.measured import Measurement, build
from splitpoint.collectives.policy import Key

pytestmark = pytest.mark.processes


def rows(times):
    key = Key("cpu", 2, "bfloat16", True, "none", 64)
    return [
        Measurement(key, nbytes, (("one_shot", one), ("two_shot", two)))
        for nbytes, one, two in times
    ]


def agree():
    rank, group = dist.get_rank(), dist.group.WORLD
    # In another order, and each slower somewhere.
    own = (
        [(1024, 1.0, 2.0), (4096, 5.0, 3.0)] if rank == 0 else [(4096, 4.0, 6.0), (1024, 3.0, 2.0)]
    )
    found = agreement.slowest(group, rows(own))
    problems = []
    for call in (
        lambda: agreement.vote(group, None, errors.WorkspaceError),
        lambda: agreement.vote(group, "no memory" if rank == 1 else None, errors.WorkspaceError),
        lambda: agreement.same(group, "policy", "a"),
        lambda: agreement.same(group, "policy", f"{rank}"),
        lambda: agreement.slowest(group, rows(own[: 1 + rank])),
    ):
        try:
            call()
            problems.append("")
        except errors.SplitpointError as error:
            problems.append(f"{type(error).__name__}: {error}")
    return [dict(row.seconds) for row in found], problems, build(found, "here").to_json()


def test_ranks_take_the_slowest_times_and_decide_alike():
    first, second = run_ranks(2, 1, agree)
    assert first == second
    times, problems, _ = first
    assert times == [{"one_shot": 3.0, "two_shot": 2.0}, {"one_shot": 5.0, "two_shot": 6.0}]
    assert problems[0] == problems[2] == ""
    assert problems[1] == "WorkspaceError: rank 1: no memory"
    assert problems[3].startswith("RanksDisagree: rank 1 has another policy than rank 0")
    assert "list of measurements" in problems[4]
