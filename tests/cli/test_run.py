import os
import subprocess
import sys

import pytest
import torch

from splitpoint import Config, errors
from splitpoint.cli.run import Job, read_policy, run
from splitpoint.cli.verbs import main
from splitpoint.collectives.policy import Policy
from tests import tiny

pytestmark = pytest.mark.processes
ARGUMENTS = ["--tokens", "3", "--dtype", "fp32", "--backend", "eager", "--prompt", "a b a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tiny.save(tmp_path_factory.mktemp("tiny"))
    tiny.save_tokenizer(made)
    return made


def said(text):
    """The answer, and what served the collectives."""
    lines = text.splitlines()
    return lines[0], next(line for line in lines if line.startswith(("1 rank,", "2 ranks,")))


def test_ranks_answer_as_one_process_does_however_they_are_started(folder, capsys):
    assert main(["run", str(folder), *ARGUMENTS]) == 0
    answer, alone = said(capsys.readouterr().out)
    assert alone == "1 rank, no collectives"

    assert main(["run", str(folder), "--tp", "2", *ARGUMENTS, "--collectives", "gloo"]) == 0
    assert said(capsys.readouterr().out) == (answer, "2 ranks, collectives by gloo")

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "splitpoint", "run", str(folder), *ARGUMENTS]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert said(done.stdout) == (answer, "2 ranks, collectives in shared memory")


def test_what_cannot_be_done_is_said_first(folder, tmp_path, monkeypatch):
    job = Job(
        str(folder),
        "fp32",
        Config(max_size=4).to_json(),
        Policy().to_json(),
        "auto",
        "a b",
        9,
        None,
    )
    with pytest.raises(errors.UsageError, match="exceed max_size=4"):
        run(job, tp=1, threads=torch.get_num_threads())
    with pytest.raises(errors.UsageError, match="cannot read the policy"):
        read_policy(tmp_path / "none.json")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(errors.UsageError, match="--tp 2 under torchrun, which started 4"):
        run(job, tp=2, threads=1)
