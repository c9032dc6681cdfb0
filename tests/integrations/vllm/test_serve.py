"""`splitpoint bench serve` with vLLM's own server and a small random model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitpoint.bench import transformers_server
from splitpoint.bench.serve import run

from .starting import NEEDS_VLLM

pytestmark = NEEDS_VLLM


@pytest.mark.parametrize("size", [1, 2])
def test_servers_answer_the_same_and_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    if (os.cpu_count() or 1) < size:
        pytest.skip("two ranks want two cores")
    before = sorted(os.listdir("/dev/shm"))
    report = run(
        str(model),
        dtype="fp32",
        rates=(4.0, float("inf")),
        inputs=(16,),
        outputs=(8,),
        requests=4,
        ranks=(size,),
        rounds=2,
        client="own",
        split_points=[[8]],
    )
    names = ["vLLM", "with splitpoint", "with 2 ranges"]
    if size > 1:
        names.append("with 2 ranges, not fused")
    assert report.ways(size) == names
    assert [start.way for start in report.starts] == names * 2
    own, ours, ranges = report.starts[:3]
    again = report.starts[len(names) + 2]
    assert all(start.answers == own.answers for start in report.starts)
    assert {len(answer) for answer in own.answers} == {32}
    assert own.said == ()
    assert "packed kernels for linear layers" in ours.said[0]
    fused = [line for line in ranges.said if "fused with a norm: 5 in" in line]
    assert len(fused) == (size if size > 1 else 0)
    for start in report.starts:
        if start.way.endswith("not fused"):
            assert not any("fused with a norm: 5 in" in line for line in start.said)
    assert sum("nothing is compiled" in line for line in again.said) == size
    assert all(each.throughput > 0 for start in report.starts for each in start.served)
    assert sorted(os.listdir("/dev/shm")) == before


def test_the_server_of_transformers_is_driven_beside(model: Path) -> None:
    if missing := transformers_server.unavailable():
        pytest.skip(missing)
    report = run(
        str(model),
        dtype="fp32",
        rates=(float("inf"),),
        inputs=(16,),
        outputs=(8,),
        requests=4,
        rounds=1,
        others=("transformers",),
    )
    assert report.environment["client"] == "own"
    assert report.ways(1)[2:] == ["transformers", "transformers with splitpoint"]
    *_, own, ours = report.starts
    assert own.texts == ours.texts
    assert all(0 < len(text.split()) <= 32 for text in own.texts)  # a token may be no word
    assert report.agreement(ours.way, 1) == "4 of 4 equal to those of transformers, as text"
    assert all(each.throughput > 0 for start in report.starts for each in start.served)
