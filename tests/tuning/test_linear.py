import dataclasses
import math

import pytest
import torch

from splitpoint import kernels
from splitpoint.passes.linear_sites import LinearShape
from splitpoint.ranges import Range
from splitpoint.torch_internals.onednn import onednn_linear, onednn_linear_available
from splitpoint.tuning.linear import LinearTuner, Weights, last_probe, probes

SHAPE = LinearShape(columns=(512,), k=512, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("seconds", "layouts", "chosen"),
    [
        ({"inductor": 3.0, "gemv": 1.0, "packed": 0.9}, (), "packed"),
        ({"inductor": 3.0, "gemv": 1.0, "packed": 0.99}, (), "gemv"),
        ({"inductor": 3.0, "gemv": 1.0, "packed": 1.01}, ("packed",), "packed"),
        ({"inductor": 3.0, "gemv": 1.0, "packed": 1.09}, ("packed",), "packed"),
        ({"inductor": 3.0, "gemv": 1.0, "packed": 1.11}, ("packed",), "gemv"),
        ({"inductor": 1.0, "gemv": 2.0, "packed": 1.04}, ("packed",), "inductor"),
        ({"inductor": 1.0, "gemv": 2.0, "packed": 1.01}, ("packed",), "packed"),
        ({"inductor": 1.0, "gemv": 2.0, "packed": 0.99}, (), "inductor"),
        ({"inductor": 1.0, "gemv": 2.0, "packed": 0.99}, ("onednn",), "inductor"),
    ],
)
def test_a_tie_goes_to_the_layout_that_is_read_already(
    seconds: dict[str, float], layouts: tuple[str, ...], chosen: str
) -> None:
    tuner = LinearTuner(threads=1)
    tuner._seconds[SHAPE.of_any_rows, 1] = seconds  # as if they had been measured
    assert tuner.choose(SHAPE, Range(1, 1), layouts) == chosen
    assert tuner.budget.spent_s == 0


def test_a_weight_that_is_to_be_freed_is_read_in_a_copy_if_one_is_right() -> None:
    tuner = LinearTuner(threads=1)
    tuner._seconds[SHAPE.of_any_rows, 1] = {"inductor": 1.0, "gemv": 0.5, "packed": 3.0}
    assert tuner.choose(SHAPE, Range(1, 1), only_copies=True) == "packed"
    tuner._seconds[SHAPE.of_any_rows, 1]["packed"] = math.inf  # as if it were wrong
    assert tuner.choose(SHAPE, Range(1, 1), only_copies=True) == "gemv"


def test_layers_that_differ_in_how_rows_follow_from_the_size_are_measured_once() -> None:
    tuner = LinearTuner(threads=1)
    tuner._seconds[SHAPE, 1] = {"inductor": 3.0, "gemv": 1.0, "packed": 2.0}
    one_row = dataclasses.replace(SHAPE, rows="1")
    assert tuner.choose(one_row, Range(1, 512)) == "gemv"
    assert tuner.budget.spent_s == 0


def test_a_models_own_weights_are_what_plain_variants_are_timed_on() -> None:
    kernels.load()
    shape = LinearShape(columns=(64,), k=32, dtype=torch.float32)
    own = [[torch.nn.Parameter(torch.randn(64, 32))] for _ in range(3)]
    weights = Weights(shape, own)
    plain, packed = weights.copies("gemv"), weights.copies("packed")
    assert [c[0].data_ptr() for c in plain[:3]] == [w[0].data_ptr() for w in own]
    assert torch.equal(weights.first("gemv")[0], weights.matrices[0])
    assert len(plain) == len(packed) == 256
    calls = weights.calls(2, ["inductor", "gemv", "packed"])
    assert set(calls) == {"inductor", "gemv", "packed"}


@pytest.mark.skipif(not onednn_linear_available(torch.float32), reason="no oneDNN here")
def test_copies_that_only_their_kernel_can_make_are_copies_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels.load()
    monkeypatch.setattr("splitpoint.tuning.linear.COLD_BYTES", 4 * 64 * 32 * 4)
    weights = Weights(LinearShape(columns=(64,), k=32, dtype=torch.float32))
    copies = [each[0] for each in weights.copies("onednn")]
    assert len({id(each) for each in copies}) == len(copies) == 4
    x = torch.randn(3, 32)
    for each in copies:
        torch.testing.assert_close(onednn_linear(x, each), x @ weights.matrices[0].t())


def test_a_weight_larger_than_the_cache_is_not_copied_but_put_out_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels.load()
    monkeypatch.setattr("splitpoint.tuning.linear.COLD_BYTES", 64 * 32 * 4)
    shape = LinearShape(columns=(64,), k=32, dtype=torch.float32)
    own = [[torch.nn.Parameter(torch.randn(64, 32))]]
    large, small = Weights(shape, own), Weights(dataclasses.replace(shape, columns=(32,)))
    assert [each[0].data_ptr() for each in large.copies("gemv")] == [own[0][0].data_ptr()]
    assert len(small.copies("gemv")) == 2

    def reads(weights: Weights) -> int:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            weights.evict()
        return sum(event.name == "splitpoint::read_memory" for event in profile.events())

    assert (reads(large), reads(small)) == (1, 0)


def test_variants_near_each_other_are_measured_at_the_end_of_a_range_too() -> None:
    tuner, rows = LinearTuner(threads=1), Range(64, 4096)
    end = last_probe(SHAPE, rows)
    assert end == 4096
    for probe in probes(SHAPE, rows):
        tuner._seconds[SHAPE, probe] = {"inductor": 1.1, "packed": 1.0, "onednn": 2.0}
    tuner._seconds[SHAPE, end] = {"inductor": 1.0, "packed": 1.5}
    names = ["inductor", "packed", "onednn"]
    found = tuner._near_at_the_end(SHAPE, rows, names, dict.fromkeys(names, 3.0), ())
    assert found == ["inductor", "packed"]  # the other was far behind before
    assert tuner.lead(SHAPE, rows, "packed") == 1 / 1.5
    assert tuner.budget.spent_s == 0


def test_the_end_of_a_range_that_all_are_measured_at_is_not_measured_again() -> None:
    assert last_probe(SHAPE, Range(1, 64)) is None
    assert last_probe(SHAPE, Range(1, 10**9)) < 10**6
