from pathlib import Path

import pytest
import torch

from splitpoint.bench.collective import NATIVE, ONE_SHOT, STANDARD, TWO_SHOT, Row, Setting
from splitpoint.bench.collective_report import CollectiveReport
from splitpoint.bench.collective_tune import from_report, from_table
from splitpoint.cli.verbs import main
from splitpoint.collectives.policy import Key, Policy

TABLES = Path(__file__).parents[1] / "data" / "allreduce_rmsnorm_tables.json"
ENVIRONMENT = {"cpu": "a CPU", "cores": 2, "threads": 1, "torch": "2.13"}


def report(times):
    rows = [
        Row(Setting(2, 64, tokens, torch.bfloat16, True, "none"), name, t, 0.1, 9, 1)
        for tokens, by_name in times.items()
        for name, t in by_name.items()
    ]
    return CollectiveReport(ENVIRONMENT, tuple(rows), Policy())


def test_what_was_measured_becomes_a_policy():
    slow = {STANDARD: 9e-4, NATIVE: 8e-4, "Shm AllReduce, norm kernel": 1e-9}
    tuned = from_report(
        report(
            {
                1: slow | {ONE_SHOT: 1e-5, TWO_SHOT: 2e-5},
                64: slow | {ONE_SHOT: 4e-5, TWO_SHOT: 2e-5},
            }
        )
    )
    key = Key("cpu", 2, "bfloat16", True, "none", 64)
    choose = lambda tokens: tuned.policy.choose(key, tokens * 64 * 2)[0]
    assert (choose(1), choose(64)) == ("one_shot", "two_shot")
    assert tuned.check() == (2, 1.0)
    assert "2 of 2 measurements" in str(tuned)


def test_public_tables_by_the_command(tmp_path, capsys):
    policy, table = tmp_path / "policy.json", tmp_path / "table.json"
    assert (
        main(["tune", "collective", str(policy), "--table", str(TABLES), "--json", str(table)]) == 0
    )
    said = capsys.readouterr().out
    assert "68 of 68 measurements get their fastest algorithm back" in said
    assert "sm100, 4 ranks, bfloat16, residual at 2 MiB" in said
    assert Policy.from_json(policy.read_text()) == from_table(TABLES).policy
    assert from_table(table).policy == from_table(TABLES).policy


@pytest.mark.processes
def test_measuring_on_two_ranks(tmp_path, capsys):
    policy = tmp_path / "policy.json"
    arguments = ["--hidden", "64", "--tokens", "1,8", "--seconds", "0.001"]
    assert main(["tune", "collective", str(policy), *arguments]) == 0
    (entry,) = Policy.from_json(policy.read_text()).entries
    assert entry.origin == "measured"
    assert entry.key == Key("cpu", 2, "bfloat16", True, "none", 64)
    assert "2 of 2 measurements" in capsys.readouterr().out
