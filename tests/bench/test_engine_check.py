"""What rounding may explain of answers that differ."""

from __future__ import annotations

import pytest

from splitpoint.bench.differences import Compared, Difference
from splitpoint.bench.engine_check import CheckReport
from splitpoint.errors import OutputMismatch

ABOUT = dict.fromkeys(("model", "mode", "vllm", "torch", "cpu", "vectors"), "x") | {"threads": 1}


def report(dtype: str, *differences: Difference) -> CheckReport:
    return CheckReport({**ABOUT, "dtype": dtype}, Compared(2, 3, differences, 0.03))


def test_equal_answers():
    found = report("fp32")
    assert "2 of 2 greedy answers of 3 tokens are the same; log-prob" in str(found)
    assert str(found).endswith("differ by up to 0.03")
    found.require()


def test_a_difference_where_the_best_tokens_are_near_each_other():
    found = report("bf16", Difference(1, 1, 0.25))
    assert "1 of 2 greedy" in str(found)
    assert "between vLLM's own two best logits there: 0.25" in str(found)
    found.require()  # a quarter is what bf16 rounds to
    with pytest.raises(OutputMismatch, match=r"prompt 1 .* token 1 on.* 0\.25 apart"):
        report("fp32", Difference(1, 1, 0.25)).require()
