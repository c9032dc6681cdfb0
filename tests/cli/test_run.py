import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from splitpoint import Config, errors
from splitpoint.cli.run import Decoding, Job, attach, read_policy, run, with_collectives
from splitpoint.cli.verbs import main
from splitpoint.collectives.launch import run_ranks
from splitpoint.collectives.policy import Policy
from splitpoint.models.tensor_parallel import load
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


PROMPT = torch.randint(tiny.VOCABULARY, (21,), generator=torch.Generator().manual_seed(0)).tolist()


def decoded(folder):
    """In a rank: the tokens after a prompt that is longer than the largest size, and those after
    the next one."""
    group = dist.group.WORLD if dist.is_initialized() else None
    model, _ = load(str(folder), torch.float32, group)
    config = with_collectives(Config(max_size=8, split_points=[2]), Policy())
    attached, _ = attach(group, "auto")
    with attached:
        decoding = Decoding(model, config, 64)
        answers = [decoding.answer(prompt, 24, None) for prompt in (PROMPT, PROMPT[:3])]
        fused = decoding.step.stats().matched("AllReduceRMSNorm")
    assert all(len(tokens) == len(seconds) for tokens, seconds in answers)
    return [tokens for tokens, _ in answers], fused


@pytest.mark.slow
def test_tokens_over_the_cache_are_those_of_transformers_with_one_rank_and_with_two(folder):
    model = tiny.model()
    model.generation_config.eos_token_id = None
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        for ids in (PROMPT, PROMPT[:3])
    ]
    expected = [expected[0][0, 21:].tolist(), expected[1][0, 3:].tolist()]
    assert decoded(folder)[0] == expected
    first, second = run_ranks(2, 1, decoded, folder)
    assert first[0] == second[0] == expected
    assert set(first[1].values()) == {2 * tiny.LAYERS}


def test_an_answer_ends_with_the_end_token(folder):
    model, _ = load(str(folder), torch.float32)
    decoding = Decoding(model, Config(max_size=8, backend="eager"), 40)
    whole, _ = decoding.answer(PROMPT, 9, None)
    at = whole.index(whole[4])
    assert decoding.answer(PROMPT, 9, whole[4])[0] == whole[: at + 1]
    assert decoding.cache.free_tokens == decoding.cache.capacity == 2048


def test_what_cannot_be_done_is_said_first(folder, tmp_path, monkeypatch):
    settings = "fp32", Config(max_size=4).to_json(), Policy().to_json(), "auto"
    job = Job(str(folder), *settings, "", 9, None)
    with pytest.raises(errors.UsageError, match="the prompt has no tokens"):
        run(job, tp=1, threads=torch.get_num_threads())
    with pytest.raises(errors.UsageError, match="cannot read the policy"):
        read_policy(tmp_path / "none.json")
    with pytest.raises(errors.UsageError, match="9999 ranks want 9999 cores, here are"):
        run(job, tp=9999, threads=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(errors.UsageError, match="--tp 2 under torchrun, which started 4"):
        run(job, tp=2, threads=1)
