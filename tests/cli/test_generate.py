"""`splitpoint generate` as a user meets it: what is on which stream, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitpoint.cli.verbs import main

from .. import tiny
from ..models.quantised import stored
from ..models.quantised.test_loading import AWQ, awq

QUICK = ("--backend", "eager", "--max-size", "16", "--dtype", "fp32", "--max-new-tokens", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.save(tmp_path_factory.mktemp("tiny"))
    tiny.save_tokenizer(made)
    return made


def test_the_answer_alone_is_on_standard_output(folder: Path, tmp_path: Path, capsys):
    file = tmp_path / "x.json"
    assert main(["generate", str(folder), "a b a", "--json", str(file), *QUICK]) == 0
    out, err = capsys.readouterr()
    data = json.loads(file.read_text())
    assert out.split() == data["text"].split()
    assert err.startswith(f"loading {folder} (fp32) ...\n")
    assert "first token after " in err
    assert "loaded from the store in" in err
    assert (data["prompt_tokens"], data["environment"]["dtype"]) == (1, "fp32")
    assert 1 <= data["new_tokens"] <= 5


def test_what_is_drawn_goes_by_the_seed(folder: Path, tmp_path: Path, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        file = tmp_path / "x.json"
        how = ("--temperature", "9", "--seed", seed, "--json", str(file))
        assert main(["generate", str(folder), "a b a", *how, *QUICK]) == 0
        texts.append(json.loads(file.read_text())["text"])
    capsys.readouterr()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "smollm2"), "the following arguments are required: PROMPT"),
        (("generate", "./nowhere", "why"), "no file or folder './nowhere'"),
        (("generate", "FOLDER", "a", "--max-new-tokens", "256"), "exceed the 256 positions"),
        (("generate", "FOLDER", "a", "--temperature", "0"), "'0' is not a number above 0"),
        (("generate", "FOLDER", "a", "--seed", "-1"), "'-1' is not an integer of 0 or more"),
        (("generate", "FOLDER", "a", "--json", "no/such/x.json"), "cannot write no/such"),
        (("bench", "generate", "FOLDER", "--entrants", "x"), "'x' is not one of eager"),
        (("bench", "generate", "FOLDER", "--new-tokens", "1"), "'1' is not an integer of 2"),
        (("bench", "generate", "FOLDER", "--prompts", "0"), "'0' is not a list of integers of 1"),
        (("bench", "generate", "FOLDER", "--plot", "no/such/x.png"), "cannot write no/such"),
        (("bench", "generate", "FOLDER", "--check", "2", "--plot", "x.png"), "--check and --plot"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, folder: Path, capsys):
    try:
        code = main([str(folder) if each == "FOLDER" else each for each in arguments])
    except SystemExit as end:  # argparse ends by itself
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert err.splitlines()[-1].startswith("splitpoint: error: ")


def test_a_quantised_checkpoint_answers(tmp_path: Path, capsys):
    stored.write(tmp_path, AWQ, awq)
    tiny.save_tokenizer(tmp_path)
    assert main(["generate", str(tmp_path), "a b a", *QUICK]) == 0
    assert "first token after " in capsys.readouterr().err
    stored.write(tmp_path, AWQ | {"version": "gemv"}, awq)
    assert main(["generate", str(tmp_path), "a b a", *QUICK]) == 2
    assert "a checkpoint of awq with version='gemv'" in capsys.readouterr().err


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys):
    assert main(["generate", str(tiny.save(tmp_path)), "why"]) == 2
    assert "has no tokenizer: a prompt cannot be read" in capsys.readouterr().err


def test_bench_generate(folder: Path, tmp_path: Path, capsys):
    files = tmp_path / "x.json", tmp_path / "x.png"
    how = ("--entrants", "eager,ours", "--prompts", "4", "--batches", "2", "--new-tokens", "3")
    how += ("--rounds", "2", "--backend", "eager", "--max-size", "16", "--dtype", "fp32")
    how += ("--json", str(files[0]), "--plot", str(files[1]))
    assert main(["bench", "generate", str(folder), *how]) == 0
    out, err = capsys.readouterr()
    assert any(line.startswith("prompt  batch") for line in out.splitlines())
    assert "2 x 4 tokens: round 2 of 2 ..." in err
    rows = json.loads(files[0].read_text())["rows"]
    assert [row["name"] for row in rows] == ["eager", "ours"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_bench_generate_check(folder: Path, tmp_path: Path, capsys):
    file = tmp_path / "x.json"
    how = ("--check", "5", "--new-tokens", "6", "--backend", "eager", "--max-size", "16")
    how += ("--dtype", "fp32", "--json", str(file))
    assert main(["bench", "generate", str(folder), *how]) == 0
    out, err = capsys.readouterr()
    assert "greedy, batch 4, left-padded: 5 prompts ..." in err
    assert "greedy, batch 1" in out
    assert all(row["differences"] == [] for row in json.loads(file.read_text())["rows"])


def test_bench_generate_requests(folder: Path, tmp_path: Path, capsys):
    file = tmp_path / "x.json"
    how = ("--requests", "3", "--rate", "50", "--rounds", "1", "--new-tokens", "4")
    how += ("--backend", "eager", "--max-size", "64", "--dtype", "fp32", "--json", str(file))
    big = tiny.save(tmp_path / "big", max_position_embeddings=512)
    assert main(["bench", "generate", str(big), *how]) == 0
    out, err = capsys.readouterr()
    assert "round 1 of 1 ..." in err
    assert "3 of 3 answers are the same" in " ".join(out.split())
    assert len(json.loads(file.read_text())["ratios"]) == 1
