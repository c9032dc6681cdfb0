"""`splitpoint bench collective`, with real ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from splitpoint.bench import collective, vllm_shm
from splitpoint.bench.collective import (
    BASELINES,
    FLOORS,
    FUSED,
    IN_PLACE,
    MOVED,
    MOVED_UNFUSED,
    ONE_SHOT,
    STANDARD,
    TWO_SHOT,
    VLLM,
    Row,
    Setting,
)
from splitpoint.bench.collective_report import CollectiveReport, run, save_pictures
from splitpoint.collectives.launch import run_ranks
from splitpoint.collectives.policy import Entry, Interval, Key, Policy, seed_policy
from splitpoint.errors import OutputMismatch, RankFailed

SETTING = Setting(2, 64, 3, torch.float32, True, "none")


@pytest.mark.slow
@pytest.mark.processes
def test_every_variant_is_verified_and_timed(tmp_path: Path) -> None:
    said: list[str] = []
    report = run(
        ranks=[2],
        hidden=[64],
        tokens=[8],
        dtype=torch.bfloat16,
        residual=[True],
        quants=["none", "fp8_token"],
        threads=1,
        budget_s=0.002,
        say=said.append,
    )
    assert said == ["2 ranks ..."]
    plain, quantised = (
        {row.variant for row in report.rows if row.setting.quant == quant}
        for quant in ("none", "fp8_token")
    )
    assert set(FUSED) < plain
    assert {name for name in plain if not name.endswith(IN_PLACE)} - {*FLOORS} == quantised
    assert {*FLOORS} < plain
    assert (VLLM + IN_PLACE in plain) is (vllm_shm.unavailable() is None)
    assert {name for names in BASELINES.values() for name in names} - {VLLM} < plain
    rows = json.loads(report.to_json())["rows"]
    assert len(rows) == len(plain) + len(quantised)
    assert all(row["ms"] > 0 and row["bursts"] >= 5 for row in rows)
    paths = save_pictures(report, tmp_path / "crossover.png")
    assert [path.name for path in paths] == [
        "crossover-2x64-bfloat16-residual-none.png",
        "crossover-2x64-bfloat16-residual-fp8_token.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_tables_are_laid_out_as_public_ones_are() -> None:
    setting = Setting(2, 1024, 32, torch.bfloat16, True, "none")
    rows = [
        Row(setting, name, seconds, 0.1, 9, 4)
        for name, seconds in ((STANDARD, 4e-4), *((name, 2e-5) for name in FUSED))
    ]
    rows += [Row(setting, name, 3e-5, 0.1, 9, 4) for name in collective.UNFUSED]
    rows += [Row(setting, MOVED, 1.5e-5, 0.1, 9, 4)]
    rows += [Row(setting, name, 2.1e-5, 0.1, 9, 4) for name in MOVED_UNFUSED]
    report = CollectiveReport(
        {"threads": 1, "cores": 2, "torch": "2", "cpu": "a CPU", "cpu_capability": "AVX"},
        tuple(rows),
        seed_policy(),
    )
    text = str(report)
    assert "### Configuration: seq_len=32, dtype=bfloat16, with residual\n" in text
    assert "| Operation                        | Time (ms) |  Speedup |\n" in text
    assert "| -------------------------------- | --------: | -------: |\n" in text
    assert "| Standard AllReduce+RMSNorm       |    0.4000 | baseline |\n" in text
    assert "| Fused one-shot                   |    0.0200 |   20.00x |\n" in text
    summary = text.split("### Fused against the rest")[1]
    assert "20.0x |            1.50x |         - |      1.40x |     75 % |" in summary
    assert "| one_shot | 0.0 ± 0.0 % |" in summary
    assert "within 5 % of the best variant in 1 of 1 configurations" in summary


def test_a_policy_that_chooses_the_slower_one_is_told_how_far_it_is_behind() -> None:
    setting = Setting(2, 1024, 32, torch.bfloat16, True, "none")
    times = {STANDARD: 4e-4, ONE_SHOT: 3e-5, ONE_SHOT + IN_PLACE: 2.4e-5, TWO_SHOT: 2e-5}
    rows = tuple(Row(setting, name, seconds, 0.1, 9, 4) for name, seconds in times.items())
    choice = CollectiveReport({}, rows, seed_policy()).choice(setting)
    assert choice.algorithm == "one_shot"
    assert choice.behind == pytest.approx(0.2)
    # Both have a quartile range of 10 % over 9 bursts.
    assert choice.error == pytest.approx(2**0.5 * 0.929 * 0.1 / 3, rel=1e-3)


def test_starts_of_the_processes_are_compared_each_in_itself() -> None:
    setting = Setting(2, 1024, 32, torch.bfloat16, True, "none")
    # The machine is twice as slow in the second start, which says nothing of the choice.
    times = [(1.1e-5, 1e-5), (2e-5, 2.2e-5), (1.2e-5, 1e-5)]
    starts = [
        [
            Row(setting, name, s, 0.1, 9, 4)
            for name, s in zip((ONE_SHOT, TWO_SHOT), pair, strict=True)
        ]
        for pair in times
    ]
    rows = collective.over_starts(starts)
    assert [row.median_s for row in rows] == [1.2e-5, 1e-5]
    report = CollectiveReport({}, tuple(rows), seed_policy())
    choice = report.choice(setting)
    assert choice.behind == pytest.approx(0.1)
    assert choice.error == pytest.approx(0.1)
    assert str(choice) == "10.0 ± 10.0 %"


def test_what_was_not_measured_is_left_out() -> None:
    setting = Setting(2, 1024, 32, torch.bfloat16, True, "none")
    rows = tuple(Row(setting, name, 2e-5, 0.1, 9, 4) for name in FUSED)
    standard = Entry(Key("cpu", 2), (Interval(None, "standard"),), "measured", "a test")
    env = {"threads": 1, "cores": 2, "torch": "2", "cpu": "a CPU", "cpu_capability": "AVX"}
    report = CollectiveReport(env, rows, Policy((standard,)))
    text = str(report)
    assert "| standard | not measured |" in text
    assert "The policy's choices were not measured." in text
    assert json.loads(report.to_json())["rows"][0]["speedup"] is None


def spoilt() -> None:
    """Verify variants of which one is wrong on one rank only."""
    given = collective._inputs(SETTING)
    right = collective._wanted(
        collective.reference.finish(
            torch.stack(given.all_ranks).sum(0), given.residual, given.weight, None, eps=1e-6
        ),
        "none",
    )
    wrong = (right[0] * 1.01, right[1])
    variants = {
        "right": collective.Variant(lambda: right),
        "wrong": collective.Variant(lambda: wrong if dist.get_rank() == 1 else right),
    }
    collective._verify(SETTING, given, variants)


@pytest.mark.slow
@pytest.mark.processes
def test_a_variant_that_is_wrong_on_one_rank_stops_all() -> None:
    with pytest.raises(OutputMismatch, match=r"^wrong: wrong on rank 1 at 3 x 64"):
        run_ranks(2, 1, spoilt)


def test_ranks_must_have_measured_alike() -> None:
    row = Row(SETTING, STANDARD, 1.0, 0.1, 9, 4)
    assert collective.same_on_all([[row], [row]]) == [row]
    with pytest.raises(RankFailed):
        collective.same_on_all([[row], [dataclasses.replace(row, median_s=2.0)]])
