"""`splitpoint bench serve` with vLLM's own server and a small random model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitpoint.bench.serve import run

from .starting import NEEDS_VLLM

pytestmark = NEEDS_VLLM


def test_servers_answer_the_same_and_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/dev/shm"))
    report = run(
        str(model),
        dtype="fp32",
        rates=(4.0, float("inf")),
        inputs=(16,),
        outputs=(8,),
        requests=4,
        rounds=1,
        client="own",
    )
    assert [start.way for start in report.starts] == ["vLLM", "with splitpoint"]
    own, ours = report.starts
    assert own.answers == ours.answers
    assert {len(answer) for answer in own.answers} == {32}
    assert own.said == ()
    assert "packed kernels for linear layers" in ours.said[0]
    assert all(each.throughput > 0 for start in report.starts for each in start.served)
    assert sorted(os.listdir("/dev/shm")) == before
