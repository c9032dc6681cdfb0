"""The tokens of what was compiled beside transformers' own, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from splitpoint import Config
from splitpoint.bench.differences import Compared, Difference
from splitpoint.bench.generate_check import WAYS, GenerateCheckReport, answers, check, left_padded
from splitpoint.errors import OutputMismatch, UsageError

from .. import tiny

CONFIG = Config(max_size=16, split_points=[4], backend="eager")


def test_all_ways_give_the_tokens_of_transformers():
    found = check(tiny.model(), "tiny", CONFIG, prompts=10, new_tokens=9)
    assert [name for name, _ in found.rows] == [way.name for way in WAYS]
    assert [(row.answers, row.same, row.tokens) for _, row in found.rows] == [
        *((10, 10, 9), (10, 10, 9)),
        *((8, 8, 9), (8, 8, 9)),
    ]
    assert [row.largest is None or row.largest < 1e-4 for _, row in found.rows] == [True] * 4
    assert [row["answers"] for row in json.loads(found.to_json())["rows"]] == [10, 10, 8, 8]
    found.require()


def test_bf16_says_where_answers_leave_each_other():
    found = check(tiny.model(torch.bfloat16), "tiny", CONFIG, prompts=6, new_tokens=20)
    for name, row in found.rows:
        assert (f"{name}: first to differ" in str(found)) == bool(row.differences)
    found.require()


def test_a_model_that_answers_otherwise_is_found():
    model, other = tiny.model(), tiny.model()
    other.model.norm.weight *= -1
    prompts = [[5, 6, 7], [8], [9, 10]]
    way = WAYS[1]
    own, theirs = (answers(each, prompts, 4, way) for each in (model, other))
    assert [each["tokens"] for each in own] != [each["tokens"] for each in theirs]


def report(dtype: str, gap: float | None) -> GenerateCheckReport:
    about = {"model": "m", "torch": "2", "cpu": "c", "cpu_capability": "v", "threads": 1}
    row = ("greedy", Compared(4, 9, (Difference(2, 3, gap),), 0.1))
    return GenerateCheckReport(about | {"dtype": dtype}, (row,))


def test_fp32_leaves_nothing_to_rounding_and_bf16_a_little():
    for gap in (1e-6, None):
        with pytest.raises(OutputMismatch, match=r"greedy: prompt 2 is .* token 3 on; fp32 leaves"):
            report("fp32", gap).require()
    report("bf16", 0.4).require()
    report("bf16", None).require()
    with pytest.raises(OutputMismatch, match=r"0\.6 lie between"):
        report("bf16", 0.6).require()
    assert "greedy: first to differ: prompt 2, token 3; between eager" in str(report("bf16", 0.4))


def test_padding_is_on_the_left():
    ids, mask = left_padded([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_more_tokens_than_positions():
    with pytest.raises(UsageError, match="256 positions"):
        check(tiny.model(), "tiny", CONFIG, new_tokens=157)
