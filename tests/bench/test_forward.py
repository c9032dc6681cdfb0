"""The comparison of a forward pass: what it reports, in text and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from splitpoint import Config
from splitpoint.bench import forward
from splitpoint.errors import UsageError
from splitpoint.ranges import Plan, Range

from .. import tiny

SIZES = (1, 3, 8)
ROW_FIELDS = {
    "size",
    "dtype",
    "threads",
    "eager_ms",
    "torch_compile_ms",
    "splitpoint_ms",
    "ratio",
    "eager_spread",
    "torch_compile_spread",
    "splitpoint_spread",
}


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(said: list[str]) -> forward.ForwardReport:
    return forward.run(
        tiny.model(torch.bfloat16),
        "tiny",
        Config(max_size=16, split_points=[4]),
        sizes=SIZES,
        budget_s=0.01,
        say=said.append,
    )


@pytest.mark.slow
class TestReport:
    def test_a_row_a_size(self, report: forward.ForwardReport):
        assert [row.size for row in report.rows] == list(SIZES)
        assert {(row.dtype, row.threads) for row in report.rows} == {("bf16", 1)}

    def test_the_ratio_is_torch_compile_over_splitpoint(self, report: forward.ForwardReport):
        for row in report.rows:
            assert row.ratio == pytest.approx(row.torch_compile_ms / row.splitpoint_ms)
            assert min(row.eager_ms, row.torch_compile_ms, row.splitpoint_ms) > 0

    def test_json(self, report: forward.ForwardReport):
        data = json.loads(report.to_json())
        assert set(data) == {"environment", "rows"}
        assert [set(row) for row in data["rows"]] == [ROW_FIELDS] * len(SIZES)
        env = data["environment"]
        assert env["torch"] == torch.__version__
        assert env["cpu"]
        assert env["clock"] == "CPU time of the calling thread"
        assert env["first_calls"]["torch.compile"]["cpu_s"] > 0
        assert env["first_calls"]["splitpoint"]["cpu_s"] > 0
        assert Plan.from_json(json.dumps(env["plan"])) == report.plan

    def test_the_plan_is_what_was_compiled(self, report: forward.ForwardReport):
        assert Range(5, 16) in report.plan.ranges
        for size in SIZES:
            assert size in report.plan.range_for(size)

    def test_progress_is_told(self, report: forward.ForwardReport, said: list[str]):
        assert [line for line in said if line.startswith("timing size")] == [
            f"timing size {size} ..." for size in SIZES
        ]

    def test_threads_are_set(self, report: forward.ForwardReport):
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("sizes", [(), (0,), (1, 17)])
def test_sizes_outside_the_plan_are_refused_before_any_work(sizes: tuple[int, ...]):
    with pytest.raises(UsageError, match="from 1 to max_size=16"):
        forward.run(None, "none", Config(max_size=16), sizes=sizes)


def test_text():
    row = forward.Row(8, "fp32", 2, 20.0, 10.0, 4.0, 2.5, 0.01, 0.034, 0.02)
    environment = {
        "model": "tiny",
        "dtype": "fp32",
        "threads": 2,
        "clock": "wall time",
        "torch": "2.13.0",
        "cpu": "a processor",
        "cpu_capability": "AVX512",
        "first_calls": {
            "torch.compile": {"cpu_s": 70.4, "wall_s": 60.0},
            "splitpoint": {"cpu_s": 30.0, "wall_s": 20.0},
        },
    }
    plan = Plan.from_config(Config(max_size=16, split_points=[4]))
    wide = dataclasses.replace(row, size=256, eager_ms=1234.567, eager_spread=0.25)
    text = str(forward.ForwardReport(environment, (row, wide), plan))
    assert text.splitlines() == [
        "tiny, fp32, 2 threads, wall time",
        "torch 2.13.0 on a processor (AVX512)",
        "",
        "size  eager ms  torch.compile ms  splitpoint ms  ratio",
        "   8     20.00             10.00           4.00  2.50x",
        " 256   1234.57             10.00           4.00  2.50x",
        "",
        "ms a call, medians; ratio = torch.compile / splitpoint.",
        "Widest interquartile spread 25%; over 20% at 256: measure these on an idle machine.",
        "Cold compile, with the first call at each size, CPU s (wall s): torch.compile 70 (60), "
        "splitpoint 30 (20); splitpoint has 2 ranges.",
    ]
