import os
import signal

import pytest
import torch
import torch.distributed as dist

from splitpoint import errors
from splitpoint.collectives.launch import run_ranks

pytestmark = pytest.mark.processes


def add(number):
    x = torch.full((2,), float(dist.get_rank() + number))
    dist.all_reduce(x)
    return dist.get_rank(), x.tolist(), torch.get_num_threads()


def misbehave(how):
    if dist.get_rank() == 1:
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "own":
            raise errors.UsageError("as asked")
        raise ZeroDivisionError("by design")
    dist.barrier()  # never comes true


def test_ranks_work_together_and_their_results_come_back_in_order():
    assert run_ranks(2, 1, add, 10) == [(0, [21.0, 21.0], 1), (1, [21.0, 21.0], 1)]


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("die", errors.RankFailed, "rank 1 died with exit code -9"),
        ("raise", errors.RankFailed, "(?s)rank 1 failed: ZeroDivisionError: by design.*Traceback"),
        ("own", errors.UsageError, "as asked"),
    ],
)
def test_a_rank_that_fails_ends_the_others(how, error, said):
    with pytest.raises(error, match=said):
        run_ranks(2, 1, misbehave, how)  # returns when both ranks are gone
