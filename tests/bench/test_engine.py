"""The report on vLLM's engine, and what is refused."""

from __future__ import annotations

import importlib.util

import pytest

from splitpoint.bench.engine import OTHERS, EngineReport, run
from splitpoint.cli.arguments.shared import ENGINES
from splitpoint.errors import UsageError


def start(way: str, first: float, second: float) -> dict[str, object]:
    return {"way": way, "seconds": {"a": first, "b": second}, "said": ["chosen"] * (way != "vllm")}


ABOUT = {
    **dict.fromkeys(("model", "dtype", "threads", "mode", "clock", "vllm", "torch"), "x"),
    "cpu": "y",
    "vectors": "z",
    "isa": None,
    "rounding": {},
}


def test_pairs_are_those_that_ran_one_after_the_other() -> None:
    starts = (
        start("vllm", 0.2, 0.1),
        start("with splitpoint", 0.1, 0.1),
        start("vllm", 0.6, 0.1),
        start("with splitpoint", 0.2, 0.2),
    )
    lines = str(EngineReport(ABOUT, starts)).splitlines()
    cells = [line.split() for line in lines if line[:2] in ("a ", "b ")]
    assert cells[0] == ["a", "400.0", "150.0", "2.67x", "2.00", "to", "3.00"]
    assert cells[1] == ["b", "100.0", "150.0", "0.67x", "0.50", "to", "1.00"]
    assert lines.count("chosen") == 1


def test_others_stand_between_and_are_compared_with_too() -> None:
    starts = (
        start("vllm", 0.4, 0.1),
        start("zentorch", 0.3, 0.1),
        start("with splitpoint", 0.1, 0.2),
    )
    report = EngineReport(ABOUT, starts)
    lines = str(report).splitlines()
    (head,) = (line for line in lines if line.startswith("milliseconds"))
    assert head.split("  ")[-1].strip() == "of the pairs"
    assert [name in head for name in ("over vllm", "over zentorch", "ratio")] == [True, True, False]
    (cells,) = (line.split() for line in lines if line.startswith("a "))
    assert cells[:5] == ["a", "400.0", "300.0", "100.0", "4.00x"]
    assert cells[8] == "3.00x"
    assert report.ways == ["vllm", "zentorch", "with splitpoint"]
    assert "medians of 1 processes each" in str(report)


def test_the_command_line_knows_the_others() -> None:
    assert ENGINES == OTHERS


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or importlib.util.find_spec("zentorch") is not None,
    reason="vLLM is not installed here, or zentorch is too",
)
def test_another_one_that_is_not_installed_is_refused() -> None:
    with pytest.raises(UsageError, match="zentorch is not installed"):
        run("smollm2", others=["zentorch"])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_so() -> None:
    with pytest.raises(UsageError, match="vLLM is not installed"):
        run("smollm2")
