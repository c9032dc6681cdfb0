"""Continuous batching by transformers alone and compiled, on a tiny model."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from splitpoint import Config
from splitpoint.bench.continuous import ContinuousReport, Rounds, Served, mixed, run
from splitpoint.bench.differences import Compared, Difference
from splitpoint.errors import OutputMismatch, UsageError

from .. import tiny

CONFIG = Config(max_size=64, split_points=[8], backend="eager")


def test_both_give_the_same_answers():
    model = tiny.model(max_position_embeddings=512)
    found = run(model, "tiny", CONFIG, requests=6, rate=100.0, new_tokens=8, rounds=2)
    assert (found.compared.same, found.compared.answers) == (6, 6)
    assert [row.name for row in found.rows] == ["eager", "ours"]
    assert all(len(row.tokens_per_s) == 2 and min(row.tokens_per_s) > 0 for row in found.rows)
    assert len(found.ratios) == len(json.loads(found.to_json())["ratios"]) == 2
    assert max(map(len, str(found).splitlines())) <= 120
    found.require()


def test_requests_are_mixed_and_the_same_each_time():
    asked = mixed(20, 8.0, 64, 1000)
    assert asked == mixed(20, 8.0, 64, 1000)
    assert all(8 <= len(each.prompt) <= 256 for each in asked)
    assert all(16 <= each.new_tokens <= 64 for each in asked)
    assert all(a.at_s < b.at_s for a, b in itertools.pairwise(asked))
    assert {each.at_s for each in mixed(5, math.inf, 64, 1000)} == {0.0}


def test_tokens_a_second():
    served = Served(((1, 2, 3), (4,)), 2.0, 0.5, 0.1)
    assert (served.tokens_per_s, served.tokens_per_cpu_s) == (2.0, 8.0)


def report(dtype: str, *differences: Difference) -> ContinuousReport:
    about = {"dtype": dtype}
    eager = Rounds("eager", (10.0, 20.0), (10.0, 10.0), (1.0, 1.0))
    ours = Rounds("ours", (20.0, 30.0), (30.0, 40.0), (1.0, 1.0))
    return ContinuousReport(about, (eager, ours), Compared(3, 9, differences, None))


def test_ratios_are_of_rounds():
    assert report("fp32").ratios == [2.0, 1.5]
    assert report("fp32").cpu_ratios == [3.0, 4.0]


def test_fp32_leaves_nothing_to_rounding():
    report("bf16", Difference(1, 2, None)).require()
    with pytest.raises(OutputMismatch, match=r"request 1 is .* token 2 on"):
        report("fp32", Difference(1, 2, None)).require()


def test_more_tokens_than_positions():
    with pytest.raises(UsageError, match="256 positions"):
        run(tiny.model(), "tiny", CONFIG)
