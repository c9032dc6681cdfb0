"""The report on servers, what servers are started as, and what is refused."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from splitpoint.bench import transformers_server, vllm_client
from splitpoint.bench.load import Load, Served
from splitpoint.bench.serve import OTHERS, _folder, check_others, check_ranks, run, ways
from splitpoint.bench.serve_report import COLUMNS, ServeReport, Start, ratio, save_picture
from splitpoint.cli.arguments.shared import SERVERS, rates
from splitpoint.errors import ServerFailed, UsageError

ABOUT = {
    **dict.fromkeys(("model", "dtype", "mode", "vllm", "torch", "cpu"), "x"),
    "threads": 1,
    "cores": 2,
    "requests": 8,
    "client": "own",
    "rounding": {},
}
LOADS = (Load(1.0, 128, 32, 8), Load(math.inf, 128, 32, 8))


def start(way, turn, factor, *, ranks=1, answers=((1, 2, 3), (4, 5, 6)), seconds=10.0, ranges=None):
    served = tuple(Served(*(factor * x for x in (100, 90, 20, 10)), 1 / factor) for _ in LOADS)
    said = ("chosen",) * (way != "vLLM")
    return Start(way, ranks, turn, seconds, answers, LOADS, served, said, ranges)


def report(*starts):
    return ServeReport(ABOUT, starts)


TWO_ROUNDS = report(
    start("vLLM", 0, 4, seconds=20.0),
    start("ours", 0, 1, answers=((1, 2, 3), (4, 9, 6)), seconds=30.0),
    start("vLLM", 1, 2, seconds=8.0),
    start("ours", 1, 2, seconds=9.0),
    start("vLLM", 2, 2, seconds=10.0),
    start("ours", 2, 0.5, seconds=11.0),
)


def cells(text, first):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {first} |")
    ]


def test_the_table_has_the_median_of_the_rounds_and_ratios():
    text = str(TWO_ROUNDS)
    assert f"| QPS | Server | {' | '.join(COLUMNS.values())} |" in text
    assert cells(text, "1") == [
        ["1", "vLLM", "200.0", "180.0", "40.0", "20.0", "0.500"],
        ["1", "ours", "100.0", "90.0", "20.0", "10.0", "1.000"],
    ]
    assert cells(text, "") == [["", "ratio", *["2.00x"] * 5]] * 2
    assert len(cells(text, "inf")) == 2
    assert text.count("chosen") == 1


def test_a_ratio_over_one_is_better_in_every_column():
    base, made = Served(100, 100, 10, 10, 2.0), Served(50, 200, 5, 20, 3.0)
    assert [ratio(base, made, name) for name in COLUMNS] == [2, 0.5, 2, 0.5, 1.5]


def test_there_is_no_ratio_of_what_is_printed_as_zero():
    own, ours = (Served(100, 90, 20, tpot, 2.0) for tpot in (8.0, 0.01))
    served = [(own, own), (ours, ours)]
    starts = [
        Start(way, 1, 0, 10.0, ((1,),), LOADS, each, ())
        for way, each in zip(("vLLM", "ours"), served, strict=True)
    ]
    text = str(report(*starts))
    assert cells(text, "1")[1][5] == "0.0"
    assert cells(text, "")[0][2:] == ["1.00x", "1.00x", "1.00x", "", "1.00x"]


def test_starts_are_cold_first_then_warm():
    text = str(TWO_ROUNDS)
    assert cells(text, "vLLM") == [["vLLM", "1", "20.0", "9.0", ""]]
    (ours,) = cells(text, "ours")
    assert ours[:4] == ["ours", "1", "30.0", "10.0"]
    assert ours[4] == "1 of 2 equal; first to differ: token 2"


def test_without_a_second_round_there_is_no_warm_start():
    text = str(report(start("vLLM", 0, 1), start("ours", 0, 1)))
    assert cells(text, "ours")[0][3:] == ["", "2 of 2 equal, 3 tokens each"]
    silent = report(start("vLLM", 0, 1, answers=((), ())), start("ours", 0, 1, answers=((), ())))
    assert "not compared" in str(silent)


def test_each_size_and_lengths_have_a_table():
    both = report(*(start(way, 0, 1, ranks=n) for n in (1, 2) for way in ("vLLM", "ours")))
    assert both.groups == [(1, 128, 32), (2, 128, 32)]
    assert str(both).count("| QPS |") == 2
    assert [row[1] for row in cells(str(both), "ours")] == ["1", "2"]


def test_json_has_every_row():
    data = json.loads(TWO_ROUNDS.to_json())
    assert len(data["starts"]) == 6
    assert data["starts"][0]["loads"][1]["qps"] == "inf"
    assert data["starts"][0]["loads"][0]["median_tpot"] == 40
    assert data["environment"] == ABOUT


def test_a_picture_for_each_table(tmp_path):
    pytest.importorskip("matplotlib")
    both = report(*(start(way, 0, 1, ranks=n) for n in (1, 2) for way in ("vLLM", "ours")))
    save_picture(both, tmp_path / "serve.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["serve-2.png", "serve.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_only_the_switch_tells_the_first_two_servers_apart():
    own, ours = ways("eager")
    assert own.arguments == ours.arguments == ("--enforce-eager",)
    assert (own.env, ours.env) == ({"SPLITPOINT_VLLM": "0"}, {"SPLITPOINT_VLLM": "1"})
    own, ours, one, three = ways("compiled", [[], [8, 64]])
    assert own.arguments == ours.arguments == ()
    for way, name, points in ((one, "with 1 range", []), (three, "with 3 ranges", [8, 64])):
        assert (way.name, way.ranges) == (name, len(points) + 1)
        assert json.loads(way.arguments[1])["compile_ranges_endpoints"] == points


def test_rounding_is_asked_for_where_splitpoint_is():
    rounding = {"weights": "int4", "activations": "int8"}
    own, ours, ranges = ways("eager", [[8]], rounding)
    assert own.arguments == ("--enforce-eager",)
    for way in (ours, ranges):
        assert way.arguments[-2] == "--additional-config"
        assert json.loads(way.arguments[-1]) == {"splitpoint": rounding}
    text = str(ServeReport({**ABOUT, "rounding": rounding}, TWO_ROUNDS.starts))
    assert "; weights in int4, activations in int8, 1 threads a rank" in text


def test_with_several_ranks_fusing_is_compared_with_not():
    *_, fused, apart = ways("eager", [[8]], {"weights": "int8"}, ranks=(1, 2))
    assert (fused.one_rank, apart.one_rank) == (True, False)
    assert fused.arguments[:2] == apart.arguments[:2]
    asked = [json.loads(way.arguments[3])["splitpoint"] for way in (fused, apart)]
    assert asked == [{"weights": "int8"}, {"weights": "int8", "fuse_allreduce": False}]
    alone = [start(way, 0, 1, ranks=1) for way in ("vLLM", "ours")]
    text = str(report(*alone, *(start(w, 0, 1, ranks=2) for w in ("vLLM", "ours", "not fused"))))
    assert [len(cells(text, way)) for way in ("vLLM", "ours", "not fused")] == [2, 2, 1]


def test_what_each_further_range_adds_to_a_start():
    rounds = [
        start(way, turn, 1, seconds=seconds, ranges=ranges)
        for turn, times in enumerate([(20.0, 30.0, 35.0, 50.0), (8.0, 9.0, 9.5, 11.0)])
        for way, ranges, seconds in zip(
            ("vLLM", "with 1 range", "with 2 ranges", "with 5 ranges"),
            (None, 1, 2, 5),
            times,
            strict=True,
        )
    ]
    whole = report(*rounds)
    assert whole.further_range(1) == pytest.approx((5.0, 0.5))
    assert cells(str(whole), "each further range") == [
        ["each further range", "1", "+5.00", "+0.50", ""]
    ]
    assert report(*rounds[:4]).further_range(1) == pytest.approx((5.0, None))
    assert report(*rounds[:2]).further_range(1) is None
    assert "each further range" not in str(TWO_ROUNDS)


def test_another_server_is_there_with_splitpoint_and_without():
    *vllms, own, ours = ways("eager", [[8]], others=["transformers"])
    assert [way.is_vllm for way in (*vllms, own, ours)] == [True] * 3 + [False] * 2
    assert [way.with_splitpoint for way in (own, ours)] == [False, True]
    assert [way.name for way in (own, ours)] == ["transformers", "transformers with splitpoint"]
    assert SERVERS == OTHERS


def test_answers_without_tokens_are_compared_as_text():
    def silent(way, texts):
        return replace(start(way, 0, 1, answers=((), ())), texts=texts)

    text = str(report(start("vLLM", 0, 1), silent("a", ("x", "y")), silent("a with b", ("x", "z"))))
    assert cells(text, "a")[-1][4] == "not compared: the server does not tell tokens"
    assert cells(text, "a with b")[-1][4] == "1 of 2 equal to those of a, as text"


def test_what_the_server_of_transformers_cannot_do_is_refused(monkeypatch):
    check_others((), (1, 2), "vllm")
    monkeypatch.setattr(transformers_server, "NEEDED", ("surely_not_there",))
    with pytest.raises(UsageError, match="needs surely_not_there"):
        check_others(("transformers",), (1,), None)
    monkeypatch.setattr(transformers_server, "NEEDED", ())
    check_others(("transformers",), (1,), None)
    with pytest.raises(UsageError, match="served by one rank"):
        check_others(("transformers",), (1, 2), None)
    with pytest.raises(UsageError, match="--client own"):
        check_others(("transformers",), (1,), "vllm")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_as_many_ranges_twice_are_refused():
    with pytest.raises(UsageError, match="--ranges was given twice"):
        run("smollm2", split_points=[[8], [16]])


@pytest.mark.parametrize("error", [None, ServerFailed, KeyboardInterrupt])
def test_only_logs_of_a_server_that_failed_stay(error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with contextlib.suppress(ServerFailed, KeyboardInterrupt), _folder() as folder:
        (folder / "a-caches").mkdir()
        (folder / "a.log").touch()
        if error is not None:
            raise error
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file() or "-c" in path.name)
    assert left == (["a.log"] if error is ServerFailed else [])


@pytest.mark.parametrize(
    ("heads", "size", "threads", "message"),
    [
        (9, 1, 10_000, None),
        (9, 2, 1, "m has 9 attention heads, which 2 ranks cannot share evenly"),
        (8, 2, 10_000, "2 ranks of 10000 threads want 20000 cores, here are"),
    ],
)
def test_ranks_that_cannot_be_are_refused(heads, size, threads, message):
    config = SimpleNamespace(num_attention_heads=heads)
    if message is None:
        check_ranks("m", config, size, threads)
        return
    with pytest.raises(UsageError, match=message):
        check_ranks("m", config, size, threads)


def test_rates_on_the_command_line():
    assert rates("1, 2.5,inf") == [1.0, 2.5, math.inf]
    for wrong in ("", "0", "1,x", "-1", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            rates(wrong)


RESULT = {
    "mean_ttft_ms": 1.0,
    "median_ttft_ms": 2.0,
    "mean_tpot_ms": 3.0,
    "median_tpot_ms": 4.0,
    "request_throughput": 5.0,
    "completed": 8,
    "total_output_tokens": 256,
}


def test_the_figures_of_vllm_bench_serve():
    assert vllm_client.served(RESULT, LOADS[0]) == Served(1.0, 2.0, 3.0, 4.0, 5.0)


@pytest.mark.parametrize("change", [{"completed": 7}, {"total_output_tokens": 255}])
def test_requests_that_failed_are_no_figures(change):
    with pytest.raises(ServerFailed, match="256 were asked for"):
        vllm_client.served(RESULT | change, LOADS[0])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_so():
    with pytest.raises(UsageError, match="vLLM is not installed"):
        run("smollm2")
    assert "vllm bench serve cannot be used" in (vllm_client.unavailable() or "")
    assert os.environ.get("SPLITPOINT_VLLM") is None
