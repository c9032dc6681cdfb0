"""Kernels chosen under load: what is compared, and that the load ends."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from splitpoint import Config
from splitpoint.bench import tuner
from splitpoint.bench.guard import descendants
from splitpoint.bench.tuner import (
    ALLOWED,
    TunerReport,
    TunerRow,
    _compared,
    alternatives,
    loaded,
)
from splitpoint.errors import LoadFailed, UsageError

from .. import tiny


@pytest.mark.slow
@pytest.mark.processes
def test_every_range_of_every_run_is_compared():
    said: list[str] = []
    model = tiny.model(torch.bfloat16, hidden_size=192, intermediate_size=256)
    config = Config(max_size=12, split_points=[4], compile_sizes=[1])
    report = tuner.run(model, "tiny", config, runs=2, load=1, budget_s=0.01, say=said.append)
    assert _loading() == [], "what loaded the machine is gone"
    assert [(row.start, row.end) for row in report.rows] == [(1, 1), (2, 4), (5, 12)]
    assert [row.sizes[0] for row in report.rows] == [1, 2, 5]
    for row in report.rows:
        assert len(row.choices) == len(row.ratios) == len(row.differences) == 2
        assert all(ratio > 0 for ratio in row.ratios)
        assert row.differences[0] == 0
        assert max(row.differences) <= report.environment["limit"]
        assert row.choices[0], "the layers are large enough to have a choice"
    assert any("alternative: packed" in line for line in said)
    data = json.loads(report.to_json())
    assert set(data) == {"environment", "rows"}
    assert data["rows"][0]["start"] == 1


def _loading() -> list[int]:
    """The processes that load the machine, and their guards."""
    found = []
    for pid in descendants():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if "disturb.py" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


@pytest.mark.processes
def test_the_load_ends_with_what_it_was_for():
    def fail() -> None:
        with loaded(2):
            assert len(_loading()) == 4, "each behind its guard"
            raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        fail()
    assert _loading() == []


@pytest.mark.processes
def test_a_load_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuner, "DISTURB", Path(__file__).parent / "absent.py")
    with pytest.raises(LoadFailed, match="ended by itself"), loaded(1):
        pass


def test_what_computes_something_else_is_no_alternative():
    plain = alternatives(Config(max_size=64, split_points=[4]), torch.float32)
    assert plain[0] == "inductor"
    assert {"packed", "gemv"} < set(plain)
    assert set(plain) <= {"inductor", "packed", "gemv", "onednn"}
    for name in plain:
        Config(max_size=64, linear={"1-64": name})  # each can be named
    assert "gemv" not in alternatives(Config(max_size=64, split_points=[]), torch.float32)
    assert alternatives(Config(max_size=64, weights="int8"), torch.float32) == []


@pytest.mark.parametrize("linear", ["inductor", {"1-4": "packed"}])
def test_there_must_be_a_choice(linear: str | dict[str, str]):
    with pytest.raises(UsageError, match="nothing to choose"):
        tuner.run(None, "none", Config(max_size=8, linear=linear))
    with pytest.raises(UsageError, match="2 or more"):
        tuner.run(None, "none", Config(max_size=8), runs=1)


def test_ways_with_the_same_kernels_are_one():
    kernels = {"run 1": "a", "run 2": "b", "run 3": "a", "inductor": "c", "packed": "a"}
    means = {"run 1": 1.06, "run 2": 1.2, "run 3": 1.0, "inductor": 1.1, "packed": 1.03}
    ratios, best, noise = _compared(kernels, means, ["run 1", "run 2", "run 3"])
    assert ratios == pytest.approx((1.03 / 1.1, 1.2 / 1.03, 1.03 / 1.1))
    assert best == "run 1"
    assert noise == pytest.approx(0.06 / 1.03)
    alone = _compared({"run 1": "a", "run 2": "a"}, means, ["run 1", "run 2"])
    assert alone[0] == (1.0, 1.0)


def test_text():
    rows = (
        TunerRow(1, 8, (1, 4, 8), ({"a": "packed"},) * 2, (0.99, 1.02), "run 1", 0.01, (0.0, 0.0)),
        TunerRow(
            9,
            64,
            (9, 32, 64),
            ({"a": "packed"}, {}),
            (1.0, ALLOWED + 0.1),
            "packed",
            0.05,
            (0.0, 2e-3),
        ),
    )
    environment = {
        "model": "tiny",
        "dtype": "bf16",
        "threads": 1,
        "clock": "CPU time",
        "torch": "2.13.0",
        "cpu": "a processor",
        "cpu_capability": "AVX512",
        "runs": 2,
        "load": 1,
        "limit": 0.05,
    }
    text = str(TunerReport(environment, rows))
    assert "[9,64]  1.000  1.130  packed" in text
    assert "More than 3% behind: [9,64]." in text
    assert "at most 0.002, where 0.05 is allowed" in text
    assert "[9,64] a: packed, inductor" in text
    assert "All runs" not in text
