"""The demo's own parts; `make demo` is the whole."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from splitpoint import Config
from splitpoint.bench import demo
from splitpoint.bench.demo import Comparison
from splitpoint.bench.demo_report import COMPILED, EAGER, OURS, DemoReport
from splitpoint.bench.demo_worker import CompiledElsewhere
from splitpoint.bench.inputs import last_logits
from splitpoint.errors import BaselineFailed, OutputMismatch
from splitpoint.tuning.measure import clock_for

from .. import tiny


class Elsewhere:
    """Takes the place of the process with torch.compile's model."""

    def __init__(self, forward, ready=lambda size: True):
        self.forward, self.ready = forward, ready
        self.calls: list[int] = []

    def call(self, ids, timeout_s=None):
        self.calls.append(ids.shape[1])
        return (self.forward(ids), 1.0) if self.ready(ids.shape[1]) else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(demo, "SIZE_S", 0.01)


def comparison(elsewhere, seconds=60.0, ours=None) -> Comparison:
    model = tiny.model()
    return Comparison(
        model,
        ours or last_logits(model),
        time.perf_counter() + seconds,
        clock_for(1),
        lambda: elsewhere,
        lambda line: None,
    )


class TestComparison:
    def test_all_three_at_each_size(self):
        it = comparison(Elsewhere(last_logits(tiny.model())))
        rows = it.run([1, 4, 16])
        assert [row.size for row in rows] == [1, 4, 16]
        assert all(set(row.measured) == {EAGER, COMPILED, OURS} for row in rows)
        assert all(row.measured[COMPILED].ms == 1000.0 for row in rows)
        assert it.notes == []

    def test_no_time_leaves_the_smallest_size(self):
        it = comparison(Elsewhere(last_logits(tiny.model())), seconds=0.0)
        assert [row.size for row in it.run([1, 4, 16])] == [1]
        assert it.notes[-1] == "Sizes left out, as time was up: 4, 16."

    def test_torch_compile_that_is_not_ready_is_left_out_and_said(self):
        elsewhere = Elsewhere(last_logits(tiny.model()), ready=lambda size: size == 1)
        it = comparison(elsewhere)
        rows = it.run([1, 4, 16])
        assert [COMPILED in row.measured for row in rows] == [True, False, False]
        assert "torch.compile was left out from size 4 on" in it.notes[0]
        assert elsewhere.calls[-1] == 4, "not asked again"

    def test_a_process_that_ends_is_said(self):
        class Ended(Elsewhere):
            def call(self, ids, timeout_s=None):
                raise BaselineFailed("it ended")

        it = comparison(Ended(None))
        assert set(it.run([1])[0].measured) == {EAGER, OURS}
        assert it.notes == ["torch.compile was left out from size 1 on: it ended."]

    def test_a_wrong_output_of_ours_ends_it(self):
        forward = last_logits(tiny.model())
        it = comparison(Elsewhere(forward), ours=lambda ids: -forward(ids))
        with pytest.raises(OutputMismatch, match="splitpoint is wrong at size 1"):
            it.run([1])


def test_report_and_picture(tmp_path: Path):
    it = comparison(Elsewhere(last_logits(tiny.model()), ready=lambda size: size == 1))
    rows = tuple(it.run([1, 4]))
    facts = {"model": "tiny", "dtype": "fp32", "threads": 1, "clock": "a clock"}
    facts |= {"torch": "2", "cpu": "some", "cpu_capability": "none"}
    plan = Config(max_size=16, split_points=[2]).plan()
    report = DemoReport(facts, {EAGER: 5.0, OURS: 20.0}, rows, tuple(it.notes), plan)
    text = str(report).splitlines()
    assert text[0].startswith("Forward pass of tiny, fp32, 1 thread, a clock")
    assert text[5].split()[2] == "-"
    assert text[6].startswith("torch.compile was left out from size 4 on")
    report.save_picture(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.processes
def test_another_process_compiles_and_can_be_ended(tmp_path: Path):
    tiny.save(tmp_path)
    ids = torch.tensor([[3, 1, 4]])
    with CompiledElsewhere(str(tmp_path), "fp32", 1) as process:
        logits, seconds = process.call(ids, 300.0)
        expected = last_logits(tiny.model())(ids)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert seconds > 0
        process._process.send_signal(signal.SIGSTOP)  # so that it cannot be done in time
        assert process.call(torch.tensor([[3, 1, 4, 1, 5]]), 0.01) is None
        with pytest.raises(BaselineFailed, match="ended by itself"):
            process.call(ids)
