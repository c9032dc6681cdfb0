"""The command line as a user meets it: processes, exit codes, what is on which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitpoint import Config
from splitpoint.cli.verbs import main
from splitpoint.torch_internals.names import USES
from tests import tiny

pytestmark = pytest.mark.processes


def splitpoint(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "splitpoint", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


class TestHelp:
    @pytest.mark.parametrize(
        "verb",
        [(), ("demo",), ("plan",), ("bench",), ("bench", "forward"), ("bench", "collective")],
    )
    def test_every_verb_has_it(self, verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as end:
            main([*verb, "--help"])
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: {' '.join(('splitpoint', *verb))} ")

    @pytest.mark.parametrize("verb", [("demo",), ("plan",), ("bench", "forward")])
    def test_it_does_without_docs(self, verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
        out = capsys.readouterr().out
        assert f"splitpoint {' '.join(verb)}" in out.split("examples:")[1]
        assert "Exit codes" in out
        assert "--max-size" in out

    def test_heavy_imports_wait_for_a_verb(self):
        code = (
            "import sys, splitpoint.cli.verbs\n"
            "try: splitpoint.cli.verbs.main(['bench', 'forward', '--help'])\n"
            "except SystemExit: pass\n"
            "print({'transformers', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr.strip() == "set()"

    def test_version(self):
        done = splitpoint("--version")
        assert done.returncode == 0
        assert done.stdout.startswith("splitpoint 0.")
        assert "torch 2." in done.stdout


class TestPlan:
    def test_the_table_and_the_model(self, folder: Path):
        arguments = ("--max-size", "100", "--split-points", "8,32", "--compile-sizes", "2")
        done = splitpoint("plan", str(folder), *arguments)
        assert done.returncode == 0
        assert done.stderr == ""
        facts, *table = done.stdout.splitlines()
        assert facts.startswith(f"{folder}: LlamaForCausalLM, 3 layers, hidden size 32")
        expected = Config(max_size=100, split_points=[8, 32], compile_sizes=[2]).plan()
        assert table == str(expected).splitlines()

    def test_defaults_above_max_size_are_left_out(self, folder: Path, capsys):
        assert main(["plan", str(folder), "--max-size", "32"]) == 0
        expected = Config(max_size=32, split_points=[8], compile_sizes=[1]).plan()
        assert str(expected) in capsys.readouterr().out

    def test_empty_lists(self, folder: Path, capsys):
        assert main(["plan", str(folder), "--split-points", "", "--compile-sizes", ""]) == 0
        assert str(Config(max_size=512).plan()) in capsys.readouterr().out

    def test_an_option_that_inductor_does_not_have(self, folder: Path, tmp_path: Path, capsys):
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"inductor_options": {"max_autotunee": True}}))
        assert main(["plan", str(folder), "--config", str(file)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "no option 'max_autotunee': did you mean 'max_autotune'" in err

    def test_a_pasted_vllm_configuration(self, folder: Path, tmp_path: Path, capsys):
        file = tmp_path / "vllm.json"
        file.write_text(json.dumps({"mode": 3, "compile_ranges_split_points": [16]}))
        assert main(["plan", str(folder), "--config", str(file)]) == 0
        out, err = capsys.readouterr()
        assert str(Config(split_points=[16]).plan()) in out
        assert err.strip() == f"{file}: fields of vLLM without a meaning here: mode"


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "the following arguments are required: VERB"),
            (("bench",), "the following arguments are required: WHAT"),
            (("fly",), "invalid choice: 'fly'"),
            (("plan", "./nowhere"), "no file or folder './nowhere'"),
            (("plan", "smollm2", "--split-points", "8,x"), "'8,x' is not a list of integers"),
            (("plan", "smollm2", "--split-points", "9,8"), "split_points must ascend"),
            (("plan", "smollm2", "--max-size", "0"), "'0' is not an integer of 1 or more"),
            (("plan", "smollm2", "--layers", "-1"), "'-1' is not an integer of 1 or more"),
            (("bench", "forward", "smollm2", "--seconds", "nan"), "'nan' is not a number of sec"),
            (("bench", "forward", "smollm2", "--sizes", "1,513"), "from 1 to max_size=512"),
            (("bench", "forward", "smollm2", "--sizes", ""), "got none"),
            (("bench", "forward", "smollm2", "--json", "no/such/x.json"), "cannot write no/such"),
            (("bench", "forward", "smollm2", "--dtype", "int3"), "invalid choice: 'int3'"),
            (("bench", "forward", "smollm2", "--baselines", "x"), "'x' is not one of max-autotune"),
            (("bench", "forward", "smollm2", "--threads", "1000000"), "1000000 threads are more"),
            (("run", "smollm2", "--threads", "1000000"), "1000000 threads are more than 8 for"),
            (("bench", "generate", "smollm2", "--rate", "4"), "give --requests N too"),
            (("bench", "encode", "smollm2"), "'smollm2' is a GGUF file, of which no encoder"),
            (("bench", "encode", "."), "cannot load '.' as an encoder with its tokenizer"),
            (("plan", "--split-points", "8,,9"), "'8,,9' is not a list of integers such as"),
            (
                ("bench", "collective", "--hidden", "7", "--tokens", "1", "--quant", "nvfp4"),
                "blocks of 16 columns, which 7 is no multiple of",
            ),
            (("demo", "--png", "no/such/x.png"), "cannot write no/such/x.png"),
            (("demo", "--config", "missing.json"), "cannot read --config missing.json"),
        ],
    )
    def test_one_line_and_exit_code_2(self, arguments: tuple[str, ...], message: str, capsys):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse ends by itself
            code = end.code
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert err.startswith("splitpoint: error: ")
        assert err.count("\n") == 1
        assert message in err

    def test_as_a_process(self):
        done = splitpoint("plan", "./nowhere")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("splitpoint: error: there is no file or folder './nowhere'")
        assert done.stderr.count("\n") == 1

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
    def test_interrupted(self, folder: Path):
        process = subprocess.Popen(
            [sys.executable, "-m", "splitpoint", "bench", "forward", str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr.readline().startswith("loading")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        # Where the signal meets exec() of a string, CPython ends itself by the signal, whoever
        # handled the exception; a shell shows 130 for both.
        assert process.returncode in (130, -signal.SIGINT)
        assert err.splitlines()[-1] == "splitpoint: interrupted"
        assert "Traceback" not in err


SWALLOWING = """
import sys, time
from splitpoint.cli import verbs

def verb(args):
    for _ in range(2):
        try:
            print("waiting", file=sys.stderr, flush=True)
            time.sleep(30)
        except KeyboardInterrupt:
            print("swallowed", file=sys.stderr, flush=True)
    time.sleep(30)

verbs.VERBS["plan"] = verb
sys.exit(verbs.main(["plan", "model"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_that_was_swallowed_comes_again():
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWING], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    said = err.splitlines()
    assert said == ["swallowed", "waiting", "swallowed", "splitpoint: interrupted"]
    assert process.returncode in (130, -signal.SIGINT)


@pytest.mark.slow
def test_bench_forward_end_to_end(folder: Path, tmp_path: Path):
    outputs = tmp_path / "rows.json", tmp_path / "curve.png"
    done = splitpoint(
        *("bench", "forward", str(folder / "config.json"), "--random-weights", "--layers", "1"),
        *("--sizes", "1,2,16", "--max-size", "16", "--split-points", "4", "--dtype", "fp32"),
        *("--baselines", "openvino,vllm", "--seconds", "0.01"),
        *("--json", str(outputs[0]), "--png", str(outputs[1])),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("size  eager ms  torch.compile ms  splitpoint ms") for line in lines)
    assert max(map(len, lines)) <= 120
    data = json.loads(outputs[0].read_text())
    assert [row["size"] for row in data["rows"]] == [1, 2, 16]
    assert {row["dtype"] for row in data["rows"]} == {"fp32"}
    notes = " ".join(data["environment"]["notes"])
    for name in ("openvino", "vllm"):
        timed = all(name in row["baselines"] for row in data["rows"])
        assert timed != (f"{name} was left out: " in notes), "one of the two"
    assert outputs[1].read_bytes().startswith(b"\x89PNG")


def test_env_says_what_a_bug_report_needs(tmp_path: Path):
    done = splitpoint("env", "--names", "--cache-dir", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    for each in ("splitpoint ", "torch ", "Python ", "CPU ", "C++ compiler ", "kernels ", "store "):
        assert any(line.startswith(each) for line in done.stdout.splitlines()), each
    assert f"{tmp_path / 'store'}: 0 entries" in done.stdout
    for use in USES:
        assert any(
            line.split(use.kind)[0].strip() == use.key for line in done.stdout.splitlines()
        ), use.key
        assert all(f"  {entry}" in done.stdout for entry in use.entries)
    assert not (tmp_path / "store").exists()
