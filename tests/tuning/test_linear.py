import dataclasses

import pytest
import torch

from splitpoint.passes.linear_sites import LinearShape
from splitpoint.ranges import Range
from splitpoint.tuning.linear import LinearTuner

SHAPE = LinearShape(columns=(512,), k=512, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("seconds", "layouts", "chosen"),
    [
        ({"inductor": 3.0, "gemv": 1.0, "packed": 0.9}, (), "packed"),
        ({"inductor": 3.0, "gemv": 1.0, "packed": 0.98}, (), "gemv"),
        ({"inductor": 3.0, "gemv": 1.0, "packed": 1.02}, ("packed",), "packed"),
        ({"inductor": 3.0, "gemv": 1.0, "packed": 1.04}, ("packed",), "gemv"),
        ({"inductor": 1.0, "gemv": 2.0, "packed": 1.02}, ("packed",), "packed"),
        ({"inductor": 1.0, "gemv": 2.0, "packed": 0.99}, (), "inductor"),
        ({"inductor": 1.0, "gemv": 2.0, "packed": 0.98}, ("onednn",), "inductor"),
    ],
)
def test_a_tie_goes_to_the_layout_that_is_read_already(
    seconds: dict[str, float], layouts: tuple[str, ...], chosen: str
) -> None:
    tuner = LinearTuner(threads=1)
    tuner._seconds[SHAPE.of_any_rows, 1] = seconds  # as if they had been measured
    assert tuner.choose(SHAPE, Range(1, 1), layouts) == chosen
    assert tuner.budget.spent_s == 0


def test_layers_that_differ_in_how_rows_follow_from_the_size_are_measured_once() -> None:
    tuner = LinearTuner(threads=1)
    tuner._seconds[SHAPE, 1] = {"inductor": 3.0, "gemv": 1.0, "packed": 2.0}
    one_row = dataclasses.replace(SHAPE, rows="1")
    assert tuner.choose(one_row, Range(1, 512)) == "gemv"
    assert tuner.budget.spent_s == 0
