"""Where answers first differ, and how near the two best tokens are there."""

from __future__ import annotations

import random

import pytest

from splitpoint.bench.differences import Difference, compare, random_prompts


def answer(tokens, *logprobs):
    return {"tokens": tokens, "logprobs": logprobs}


OWN = [
    answer([1, 2, 3], (-0.1, -4.0), (-0.2, -4.0), (-0.3, -4.0)),
    answer([4, 5, 6], (-0.1, -4.0), (-1.0, -1.25), (-0.3, -4.0)),
]


def test_equal_answers_say_how_far_their_scores_are_apart():
    found = compare(OWN, [OWN[0], answer([4, 5, 6], (-0.1, -4.0), (-1.0, -1.25), (-0.33, -4.0))])
    assert (found.differences, found.same, found.where("my")) == ((), 2, "")
    assert found.largest == pytest.approx(0.03)


def test_the_first_difference_has_the_gap_between_the_best_two():
    # After a difference the texts go on apart: what follows is not compared.
    ours = [OWN[0], answer([4, 9, 9], (-0.15, -4.0), (-1.1, -1.2), (-9.0, -9.5))]
    found = compare(OWN, ours)
    assert found.differences == (Difference(1, 1, pytest.approx(0.25)),)
    assert (found.same, found.largest) == (1, pytest.approx(0.05))
    assert found.where("its own").startswith(
        "first to differ: prompt 1, token 1; between its own two best logits there: 0.25 (median"
    )


def test_tokens_that_are_not_the_likeliest_have_no_gap():
    found = compare([answer([1, 2]), answer([3, 4])], [answer([1, 5]), answer([6, 4])])
    assert found.differences == (Difference(0, 1, None), Difference(1, 0, None))
    assert found.largest is None
    assert found.where("my") == "first to differ: prompt 1, token 0"


def test_prompts_are_the_same_each_time():
    first = random_prompts(9, random.Random(0))
    assert first == random_prompts(9, random.Random(0))
    assert {len(each) for each in first} <= set(range(1, 101))
