"""The comparison of a forward pass: what it reports, in text and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from splitpoint import Config
from splitpoint.bench import forward
from splitpoint.bench.entrants import one_kernel, single_kernels
from splitpoint.bench.forward_report import Floor, ForwardReport, Measured, Row, Verdict, variant_of
from splitpoint.errors import UsageError
from splitpoint.ranges import Plan, PlannedRange, Range

from .. import tiny

SIZES = (1, 3, 8)
ROW_FIELDS = {
    *("size", "dtype", "threads", "variant", "ratio"),
    *("eager_ms", "torch_compile_ms", "splitpoint_ms"),
    *("eager_spread", "torch_compile_spread", "splitpoint_spread"),
    *("floor_ms", "floor_share", "read_gb_s", "peak_gflop_s"),
    *("repeats", "singles", "best_single", "best_single_ms", "baselines"),
}


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(said: list[str]) -> ForwardReport:
    return forward.run(
        tiny.OneLinear(torch.bfloat16),
        "tiny",
        Config(max_size=20, split_points=[4]),
        sizes=SIZES,
        budget_s=0.01,
        singles=True,
        say=said.append,
    )


@pytest.mark.slow
class TestReport:
    def test_a_row_a_size(self, report: ForwardReport):
        assert [row.size for row in report.rows] == list(SIZES)
        assert {(row.dtype, row.threads) for row in report.rows} == {("bf16", 1)}

    def test_the_ratio_is_torch_compile_over_splitpoint(self, report: ForwardReport):
        for row in report.rows:
            assert row.ratio == pytest.approx(row.torch_compile.ms / row.splitpoint.ms)
            assert min(measured.ms for measured in row.measured.values()) > 0

    def test_the_floor_is_below_what_was_reached(self, report: ForwardReport):
        for row in report.rows:
            assert row.floor is not None
            assert 0 < row.floor.ms <= row.splitpoint.ms
            assert row.floor_share == pytest.approx(row.floor.ms / row.splitpoint.ms)

    def test_single_kernels(self, report: ForwardReport):
        for row in report.rows:
            assert {"inductor", "packed"} <= set(row.singles)
            assert "gemv" not in row.singles, "it is not for all sizes"
        assert report.best_single in report.rows[0].singles
        assert {"only inductor", "only packed"} <= set(report.environment["output_error"])
        assert report.environment["first_calls"]["only packed"]["cpu_s"] > 0

    def test_json(self, report: ForwardReport):
        data = json.loads(report.to_json())
        assert set(data) == {"environment", "rows", "verdicts"}
        assert [set(row) for row in data["rows"]] == [ROW_FIELDS] * len(SIZES)
        for row in data["rows"]:
            assert row["best_single_ms"] == row["singles"][row["best_single"]]["ms"]
        env = data["environment"]
        assert env["torch"] == torch.__version__
        assert env["cpu"]
        assert env["clock"] == "CPU time of the calling thread"
        assert env["first_calls"]["torch.compile"]["cpu_s"] > 0
        assert env["first_calls"]["splitpoint"]["cpu_s"] > 0
        assert Plan.from_json(json.dumps(env["plan"])) == report.plan

    def test_the_plan_is_what_was_compiled(self, report: ForwardReport):
        assert Range(5, 20) in report.plan.ranges
        for size in SIZES:
            assert size in report.plan.range_for(size)

    def test_progress_is_told(self, report: ForwardReport, said: list[str]):
        assert [line for line in said if line.startswith("timing size")] == [
            f"timing size {size} ..." for size in SIZES
        ]

    def test_threads_are_set(self, report: ForwardReport):
        assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_baselines_are_timed_where_they_are_right_and_noted_where_not(
    monkeypatch: pytest.MonkeyPatch,
):
    from splitpoint.bench.baseline import Baseline
    from splitpoint.bench.baselines import BASELINES
    from splitpoint.bench.inputs import CompiledForward
    from splitpoint.errors import BaselineFailed

    def plain(model, sizes):
        return CompiledForward(model, backend="eager")

    def noise(model, sizes):
        return CompiledForward(model, backend=lambda g, _: lambda *a: (g(*a)[0].neg(),))

    def fails_at_3(model, sizes):
        if sizes == [3]:
            raise BaselineFailed("this knows no size 3")
        return plain(model, sizes)

    for name, build, per_size, reason in (
        ("right", plain, False, None),
        ("wrong", noise, False, None),
        ("partly", fails_at_3, True, None),
        ("absent", plain, False, "it is not installed: install it"),
    ):
        entry = Baseline(name, name, lambda _, r=reason: r, lambda s: s.model, build, per_size)
        monkeypatch.setitem(BASELINES, name, entry)
    report = forward.run(
        tiny.OneLinear(torch.float32),
        "tiny",
        Config(max_size=4, backend="eager"),
        sizes=(1, 3),
        budget_s=0.01,
        baselines=["right", "wrong", "partly", "absent"],
    )
    assert [set(row.baselines) for row in report.rows] == [{"right", "partly"}, {"right"}]
    wrong, absent, partly = report.environment["notes"]
    assert wrong.startswith("wrong is wrong at size 1")
    assert absent == "absent was left out: it is not installed: install it."
    assert partly == "this knows no size 3"
    assert report.environment["first_calls"]["partly"]["cpu_s"] > 0
    *_, one, three = report.others()
    assert "-" not in one.split()
    assert three.split()[-2:] == ["-", "-"]
    assert report.best_single is None
    data = json.loads(report.to_json())
    assert set(data["verdicts"]) == {"right", "partly"}
    assert data["verdicts"]["partly"]["sizes"] == 1
    assert data["verdicts"]["partly"]["cold_ratio"] > 0


@pytest.mark.parametrize("sizes", [(), (0,), (1, 17)])
def test_sizes_outside_the_plan_are_refused_before_any_work(sizes: tuple[int, ...]):
    with pytest.raises(UsageError, match="from 1 to max_size=16"):
        forward.run(None, "none", Config(max_size=16), sizes=sizes)


def test_a_baseline_that_there_is_not_is_refused_before_any_work():
    with pytest.raises(
        UsageError, match="no baseline 'x': choose from max-autotune, fp32, openvino"
    ):
        forward.run(None, "none", Config(max_size=16), sizes=[1], baselines=["vllm", "x"])


def test_one_kernel_for_all_sizes():
    config = Config(max_size=64, split_points=[8], compile_sizes=[1], max_packed_bytes=5)
    only = one_kernel(config, "packed")
    assert only.plan().ranges == (Range(1, 64),)
    assert only.linear_for(Range(1, 64)) == only.linear_for(Range(1, 20)) == "packed"
    assert only.max_packed_bytes == 5
    assert single_kernels(64)[:2] == ["inductor", "packed"]
    assert "gemv" not in single_kernels(64)


@pytest.mark.parametrize(
    ("linear", "text"),
    [
        ({}, "inductor"),
        ({"a": "packed", "b": "packed"}, "packed"),
        ({"a": "gemv", "b": "packed", "c": "packed"}, "packed 2, gemv 1"),
        ({"a": "packed", "b": "inductor", "c": "inductor"}, "inductor 2, packed 1"),
    ],
)
def test_the_kernels_of_a_size(linear: dict[str, str], text: str):
    assert variant_of(PlannedRange(Range(1, 8), 8, linear=linear)) == text


def made_up(**changes: object) -> ForwardReport:
    row = Row(
        size=8,
        dtype="fp32",
        threads=2,
        variant="packed 4, gemv 1",
        eager=Measured(20.0, 0.01),
        torch_compile=Measured(10.0, 0.034),
        splitpoint=Measured(4.0, 0.02),
        floor=Floor(3.0, 30.0, 400.0),
    )
    row = dataclasses.replace(row, **changes)  # type: ignore[arg-type]
    wide = dataclasses.replace(row, size=256, eager=Measured(1234.567, 0.25))
    environment = {
        "model": "tiny",
        "dtype": "fp32",
        "threads": 2,
        "clock": "wall time",
        "torch": "2.13.0",
        "cpu": "a processor",
        "cpu_capability": "AVX512",
        "notes": [],
        "first_calls": {
            "torch.compile": {"cpu_s": 70.4, "wall_s": 60.0},
            "splitpoint": {"cpu_s": 30.0, "wall_s": 20.0},
        },
    }
    plan = Config(max_size=16, split_points=[4]).plan()
    return ForwardReport(environment, (row, wide), plan)


def test_text():
    assert str(made_up()).splitlines() == [
        "tiny, fp32, 2 threads, wall time",
        "torch 2.13.0 on a processor (AVX512)",
        "",
        "size  eager ms  torch.compile ms  splitpoint ms  ratio  floor ms  of floor  kernels",
        "   8     20.00             10.00           4.00  2.50x      3.00       75%  "
        "packed 4, gemv 1",
        " 256   1234.57             10.00           4.00  2.50x      3.00       75%  "
        "packed 4, gemv 1",
        "",
        "ms a call, medians; ratio = torch.compile / splitpoint.",
        "floor: for each linear layer the longer of reading its weight once (30.0 GB/s) and its "
        "arithmetic (400 GFLOP/s), the",
        "  most that was seen in this run, by probes in turn with the rest or by a pass itself; "
        "nothing for attention. of",
        "  floor: floor / splitpoint.",
        "Widest interquartile spread 25%; over 20% at 256: measure these on an idle machine.",
        "",
        "compiled cold  CPU s  wall s  over splitpoint  graphs for",
        "torch.compile     70      60             2.3x  all sizes",
        "splitpoint        30      20             1.0x  2 ranges",
    ]


def test_what_was_too_slow_for_its_budget_is_named():
    report = made_up(eager=Measured(20.0, 0.01, 9), torch_compile=Measured(9e3, 0.0, 3))
    report.environment["budget_s"] = 1.5
    said = " ".join(str(report).split())
    assert (
        "Fewer repeats, as 1.5 s is for each at a size, but 3 repeats: torch.compile at 8 (3). "
        in said
    )
    assert report.rows[0].to_json()["repeats"]["eager"] == 9


def test_text_without_a_floor():
    text = str(made_up(floor=None))
    assert "floor" not in text
    assert "size  eager ms  torch.compile ms  splitpoint ms  ratio  kernels" in text


def test_text_with_others():
    report = made_up(
        singles={"inductor": Measured(9.0, 0.0), "packed": Measured(5.0, 0.0)},
        baselines={name: Measured(1234.5, 0.0) for name in ("max-autotune", "openvino", "vllm")},
    )
    assert report.best_single == "packed"
    assert report.single("packed") == pytest.approx(1.25)
    heading, first, second = report.others()
    names = ["splitpoint", "only packed", "max-autotune", "openvino", "vllm"]
    positions = [heading.index(f"{name} ms") for name in names]
    assert positions == sorted(positions)
    assert heading.count("ratio") == len(names) - 1
    assert first.split() == ["8", "4.00", "5.00", "1.25x", *["1234.50", "308.62x"] * 3]
    assert second.split()[0] == "256"
    costs = report.environment["first_calls"]
    costs["vllm"] = {"cpu_s": 150.0, "wall_s": 1.0}
    verdicts = report.verdicts()
    assert verdicts["vllm"] == Verdict(2, 8, 1234.5 / 4, 5.0)
    assert verdicts["openvino"].cold_ratio is None
    row = report.rows[0].to_json()["baselines"]["vllm"]
    assert row == {"ms": 1234.5, "spread": 0.0, "repeats": 0, "ratio": 1234.5 / 4}
    text = str(report)
    said = " ".join(text.split())
    assert (
        "Against vllm, splitpoint is slower at none of 2 sizes, the least ratio 308.62x at 8; "
        "compiling cold costs 5.0 times splitpoint's." in said
    )
    assert "packed 1.25x, inductor 2.25x." in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120
