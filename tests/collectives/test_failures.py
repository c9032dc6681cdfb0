"""A call that cannot be finished is an error on every rank, soon, and never hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from splitpoint import errors
from splitpoint.collectives import policy
from tests.collectives import calls
from tests.collectives.calls import Ended, Step
from tests.collectives.ranks import Ranks, detach

pytestmark = pytest.mark.processes

Fresh = Callable[..., Ranks]

FUSED: Step = ("fused", {})
REDUCED: Step = ("reduced", {})


def test_a_rank_that_died_before_the_call_is_named(fresh: Fresh) -> None:
    ranks = fresh(3)
    ranks.run(calls.make, [[FUSED]] * 3)
    ranks.start(calls.die, ranks=[1])
    ranks.processes[1].join()
    ranks.start(calls.make, [[REDUCED]] * 3, ranks=[0, 2])
    for rank in (0, 2):
        ended: Ended = ranks.result(rank)
        assert ended.error.startswith("CollectiveFailed: group ")
        assert f"rank 1 (process {ranks.processes[1].pid}) died" in ended.error
        assert "call 2, all_reduce of 64 float32" in ended.error
        assert ended.seconds < 1


def test_a_failed_collective_is_an_error_of_this_package_and_of_torch() -> None:
    assert issubclass(errors.CollectiveFailed, errors.SplitpointError)
    assert issubclass(errors.CollectiveFailed, torch.distributed.DistBackendError)


def test_a_rank_that_dies_while_others_wait_is_named(fresh: Fresh) -> None:
    ranks = fresh(2)
    ranks.start(calls.make, [[FUSED]] * 2, ranks=[0])
    time.sleep(0.5)
    died = time.monotonic()
    ranks.start(calls.die, ranks=[1])
    ended: Ended = ranks.result(0)
    assert time.monotonic() - died < 1
    assert "rank 1" in ended.error
    assert "died before or during call 1, allreduce_rmsnorm of [4, 64] bfloat16" in ended.error
    # What failed stays failed, and says so at once.
    ranks.start(calls.make, [[REDUCED]] * 2, ranks=[0])
    again: Ended = ranks.result(0)
    assert "died" in again.error
    assert again.seconds < 0.5


def test_a_rank_that_ended_after_its_last_call_is_no_error(fresh: Fresh) -> None:
    ranks = fresh(2)
    for _ in range(20):
        ranks.run(calls.make, [[FUSED]] * 2)
    ranks.start(calls.make, [[FUSED]] * 2)
    ranks.start(calls.die, ranks=[1])
    assert ranks.result(0).error == ""


def test_a_stopped_rank_is_named_after_the_time_out(fresh: Fresh) -> None:
    ranks = fresh(3, timeout_s=1.0)
    ranks.start(calls.stop, ranks=[2])
    ranks.start(calls.make, [[FUSED]] * 3, ranks=[0, 1])
    for rank in (0, 1):
        ended: Ended = ranks.result(rank)
        assert (
            f"rank 2 (process {ranks.processes[2].pid}) did not take part in call 1" in ended.error
        )
        assert "within 1 s; rank 2 has made no call yet" in ended.error
        assert 0.9 < ended.seconds < 3
    pid = ranks.processes[2].pid
    assert pid is not None
    os.kill(pid, signal.SIGCONT)
    ranks.result(2)
    ranks.start(calls.make, [[FUSED]] * 3, ranks=[2])
    late: Ended = ranks.result(2)
    assert "did not take part in call 1" in late.error
    assert late.seconds < 1


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([FUSED], [("fused", {"rows": 5})], "[5, 64] bfloat16"),
        ([FUSED], [("fused", {"dtype": torch.float16})], "float16"),
        ([FUSED], [("fused", {"eps": 1e-5})], "eps 1e-05"),
        ([FUSED], [("fused", {"weight_bias": 1.0})], "weight_bias 1"),
        ([FUSED], [("fused", {"residual": torch.ones(4, 64)})], "float32 residual"),
        ([FUSED], [("fused", {"quant": "fp8_token"})], "quant fp8_token"),
        ([FUSED], [("fused", {"algorithm": "two_shot"})], "two_shot"),
        ([FUSED], [("fused", {"want_residual": False})], "sum not kept"),
        ([FUSED], [("fused", {"algorithm": "reference"})], "the reference of a collective"),
        ([FUSED], [("fused", {"weight": torch.ones(3)})], "arguments it refused"),
        ([FUSED, REDUCED], [REDUCED, FUSED], "all_reduce of 64 float32"),
        ([REDUCED], [("gathered", {"rows": 2})], "all_gather of 24 bytes"),
        ([REDUCED] * 9, [*[REDUCED] * 8, ("reduced", {"count": 65})], "call 9, all_reduce of 65"),
        # Of several chunks, whose numbers must not be taken for those of later calls.
        ([("fused", {"rows": 4096})], [FUSED] * 20, "[4096, 64] bfloat16"),
    ],
)
def test_ranks_that_disagree_all_get_an_error(
    three: Ranks, first: list[Step], second: list[Step], said: str
) -> None:
    ended: list[Ended] = three.run(calls.make, [first, second, first])
    for each in ended:
        assert each.error
        assert each.seconds < 5
    messages = [each.error for each in ended if "the ranks disagree" in each.error]
    # The rank whose arguments have no meaning reports just that.
    assert len(messages) == 3 - ("refused" in said)
    assert said in messages[0]
    assert len({message.partition("the ranks disagree")[2] for message in messages}) == 1


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (("fused", {"dtype": torch.float64}), "TypeError: input must be"),
        (("fused", {"weight": torch.ones(3)}), "ValueError: weight must be [64]"),
        (("fused", {"residual": torch.ones(4, 63)}), "ValueError: residual must have"),
        (("fused", {"residual": torch.ones(4, 64).half()}), "TypeError: residual must be"),
        (("fused", {"quant": "int8"}), "ValueError: quant must be"),
        (("fused", {"quant": "fp8_static"}), "ValueError: quant_scale goes with"),
        *(
            (("fused", {"algorithm": text}), "ValueError: algorithm must be")
            for text in ("ring", "one_shot:512", "one_shot,two_shot", "one_shot:x,two_shot", "")
        ),
        (("fused", {"hidden": 1 << 17}), "max_bytes of at least 262144"),
        (("scattered", {"rows": 3}), "ValueError: reduce_scatter splits dimension 0 evenly"),
    ],
)
def test_arguments_refused_by_all_ranks_leave_the_group_as_it_was(
    attached: Callable[[int], Ranks], step: Step, said: str
) -> None:
    ranks = attached(2)
    for each in ranks.run(calls.make, [[step]] * 2):
        assert said in each.error
    assert [each.error for each in ranks.run(calls.make, [[FUSED, REDUCED]] * 2)] == ["", ""]


_SEEDED = policy.seed_policy().entry(policy.Key("cpu", 2, quant="none"))
assert _SEEDED is not None
SEED = policy.spelled(_SEEDED.intervals)
"""What "auto" is for two ranks without quantisation."""
LAST = _SEEDED.intervals[0].end
assert LAST is not None


@pytest.mark.parametrize(
    ("text", "rows"),
    [("one_shot:512,two_shot", 4), ("one_shot:512,two_shot", 5), ("two_shot:1,one_shot", 1)]
    + [("two_shot:128,one_shot:256,two_shot", rows) for rows in (1, 2, 3)]
    + [("auto", rows) for rows in (1, LAST // 128, LAST // 128 + 1)],
)
def test_intervals_of_bytes_choose_as_they_do_in_python(
    attached: Callable[[int], Ranks], text: str, rows: int
) -> None:
    # Ranks that take different algorithms are an error, so the other one names what it must be.
    same = policy.chosen(SEED if text == "auto" else text, rows * 64 * 2)
    steps: list[list[Step]] = [
        [("fused", {"rows": rows, "algorithm": algorithm})] for algorithm in (text, same)
    ]
    assert [each.error for each in attached(2).run(calls.make, steps)] == ["", ""]


def test_a_rank_that_detached_is_named(fresh: Fresh) -> None:
    ranks = fresh(2)
    ranks.start(detach, ranks=[1])
    ranks.result(1)
    ranks.start(calls.make, [[FUSED]] * 2, ranks=[0])
    ended: Ended = ranks.result(0)
    assert "rank 1" in ended.error
    assert "detached its workspace before call 1" in ended.error
    assert ended.seconds < 1


def attach_again() -> Any:
    from tests.collectives.ranks import attach

    return attach()


def test_after_a_failure_a_new_workspace_serves_the_group(fresh: Fresh) -> None:
    ranks = fresh(2)
    ended = ranks.run(calls.make, [[FUSED], [REDUCED]])
    assert all(each.error for each in ended)
    ranks.run(detach)
    ranks.run(attach_again)
    assert [each.error for each in ranks.run(calls.make, [[FUSED] * 3] * 2)] == ["", ""]
