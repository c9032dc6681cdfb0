"""Where answers differ, and what rounding may explain."""

from __future__ import annotations

import pytest

from splitpoint.bench.engine_check import compare
from splitpoint.errors import OutputMismatch

ABOUT = dict.fromkeys(("model", "mode", "vllm", "torch", "cpu", "vectors"), "x") | {"threads": 1}


def answer(tokens, *logprobs):
    return {"tokens": tokens, "logprobs": logprobs}


OWN = [
    answer([1, 2, 3], (-0.1, -4.0), (-0.2, -4.0), (-0.3, -4.0)),
    answer([4, 5, 6], (-0.1, -4.0), (-1.0, -1.25), (-0.3, -4.0)),
]


def test_equal_answers_say_how_far_their_scores_are_apart():
    ours = [OWN[0], answer([4, 5, 6], (-0.1, -4.0), (-1.0, -1.25), (-0.33, -4.0))]
    found = compare(OWN, ours, {**ABOUT, "dtype": "fp32"})
    assert found.differences == ()
    assert found.largest == pytest.approx(0.03)
    assert "2 of 2 greedy answers of 3 tokens are the same" in str(found)
    found.require()


def test_the_first_difference_has_the_gap_between_the_best_two():
    # After a difference the texts go on apart: what follows is not compared.
    ours = [OWN[0], answer([4, 9, 9], (-0.15, -4.0), (-1.1, -1.2), (-9.0, -9.5))]
    found = compare(OWN, ours, {**ABOUT, "dtype": "bf16"})
    (difference,) = found.differences
    assert (difference.prompt, difference.token) == (1, 1)
    assert difference.gap == pytest.approx(0.25)
    assert found.largest == pytest.approx(0.05)
    assert "1 of 2 greedy" in str(found)
    found.require()  # a quarter is what bf16 rounds to
    with pytest.raises(OutputMismatch, match=r"prompt 1 .* token 1 on.* 0\.25 apart"):
        compare(OWN, ours, {**ABOUT, "dtype": "fp32"}).require()
