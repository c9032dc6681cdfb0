"""`bench.device` as a dry run on CPU: every part says what it found, and costs no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitpoint.bench import device
from splitpoint.bench.device_parts import PARTS


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / device.RESULTS).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.processes
def test_a_dry_run_says_something_of_every_part(tmp_path: Path):
    command = [sys.executable, "-m", "splitpoint.bench.device", "--device", "cpu", "--quick"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path)
    ended = {row["part"] for row in found if row.get("done")}
    assert ended == set(PARTS)
    assert not [row for row in found if "failed" in row and row["part"] != "all"]
    assert all(row["right"] for row in found if "right" in row)
    unchanged = [row for row in found if "earlier_results_unchanged" in row]
    assert [row["earlier_results_unchanged"] for row in unchanged] == [True]
    turns = [row["in_turns_ms"] for row in found if "in_turns_ms" in row]
    assert {name for each in turns for name in each} == {
        *("eager", "splitpoint", "torch.compile(dynamic=True)"),
    }
    (warm,) = [row for row in found if row.get("start") == "warm"]
    assert (warm["compilations"], warm["loads"] > 0) == (0, True)


@pytest.mark.processes
def test_a_part_whose_time_is_over_is_cut_and_the_next_one_runs(tmp_path: Path):
    given = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--minutes", "0.1"]
    assert device.main([*given, "--parts", "environment,speed", "--skip", "environment"]) == 0
    found = rows(tmp_path)
    assert found[0]["left_out"] == "asked for"
    assert "cut_after_s" in found[-2]
    assert found[-1]["part"] == "all"


def test_a_device_that_is_not_there_fails_its_parts(tmp_path: Path):
    given = ["--device", "mps", "--quick", "--out", str(tmp_path)]
    assert device.main([*given, "--parts", "environment"]) == 1
    found = rows(tmp_path)
    assert (found[-2]["exit"], found[-1]["failed"]) == (1, 1)
    assert not any("done" in row for row in found)


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        device.main(["--parts", "sped"])
    assert "no part 'sped'" in capsys.readouterr().err
