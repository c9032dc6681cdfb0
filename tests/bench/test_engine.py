"""The report on vLLM's engine, and what is refused."""

from __future__ import annotations

import importlib.util

import pytest

from splitpoint.bench.engine import EngineReport, run
from splitpoint.errors import UsageError


def start(way: str, first: float, second: float) -> dict[str, object]:
    return {"way": way, "seconds": {"a": first, "b": second}, "said": ["chosen"] * (way != "vllm")}


def test_pairs_are_those_that_ran_one_after_the_other() -> None:
    about = dict.fromkeys(("model", "dtype", "threads", "mode", "clock", "vllm", "torch"), "x")
    starts = (
        start("vllm", 0.2, 0.1),
        start("with splitpoint", 0.1, 0.1),
        start("vllm", 0.6, 0.1),
        start("with splitpoint", 0.2, 0.2),
    )
    lines = str(
        EngineReport({**about, "cpu": "y", "vectors": "z", "isa": None, "weights": None}, starts)
    ).splitlines()
    cells = [line.split() for line in lines if line[:2] in ("a ", "b ")]
    assert cells[0] == ["a", "400.0", "150.0", "2.67x", "2.00", "to", "3.00"]
    assert cells[1] == ["b", "100.0", "150.0", "0.67x", "0.50", "to", "1.00"]
    assert lines.count("chosen") == 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_so() -> None:
    with pytest.raises(UsageError, match="vLLM is not installed"):
        run("smollm2")
