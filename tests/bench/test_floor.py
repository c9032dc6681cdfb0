"""The floor of a forward pass: what is counted, and at what rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import splitpoint.integrations.transformers as sp
from splitpoint.bench.floor import (
    FP32_REGISTERS,
    GEMM,
    READ,
    REGISTERS,
    Layer,
    Probes,
    Rates,
    Work,
    work_of,
)
from splitpoint.config import Weights
from splitpoint.tuning.measure import THREAD_CPU_TIME, interleave

from .. import tiny
from ..models.quantised import stored
from ..models.quantised.test_loading import AWQ, awq


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_is_counted_with_its_rows(dtype: torch.dtype):
    model = tiny.model(dtype)
    work = work_of(model, 5)
    assert len(work.layers) == 7 * tiny.LAYERS + 1
    *layers, head = work.layers
    assert {layer.rows for layer in layers} == {5}
    assert head.rows == 1, "the logits of the last token only"
    assert (head.n, head.k) == (tiny.VOCABULARY, tiny.HIDDEN)
    assert head.weight_bytes == tiny.VOCABULARY * tiny.HIDDEN * dtype.itemsize
    everything = sum(p.nbytes for p in model.parameters())  # tied: the head is the embedding
    assert sum(layer.weight_bytes for layer in work.layers) + work.other_bytes == everything
    assert work.other_bytes == (2 * tiny.LAYERS + 1) * tiny.HIDDEN * dtype.itemsize, "the norms"
    assert not any(module._forward_hooks for module in model.modules())


def test_packed_weights_count_as_they_lie(tmp_path: Path):
    stored.write(tmp_path, AWQ, awq)
    work = work_of(sp.load(tmp_path), 5)
    *layers, head = work.layers
    assert len(layers) == 7 * tiny.LAYERS
    for layer in layers:  # in whole blocks of 32: scales of 4 bytes and zero points beside 4 bits
        assert layer.weight_bytes == -(-layer.n // 32) * layer.k * (16 + 5)
    assert head.weight_bytes == tiny.VOCABULARY * tiny.HIDDEN * 2
    assert work.other_bytes == (2 * tiny.LAYERS + 1) * tiny.HIDDEN * 2, "the norms"


def test_each_layer_takes_the_longer_of_its_two_times():
    # 4000 bytes each, and 2000 operations a row.
    work = Work((Layer(100, 10, 4000, rows=1), Layer(100, 10, 4000, rows=50)), 30)
    assert work.floor_s(Rates(bytes_s=1e3, flops_s=1e4)) == pytest.approx(4 + 10 + 0.03)


class TestRaised:
    work = Work((Layer(100, 10, 4000, rows=1), Layer(100, 10, 4000, rows=50)), 30)
    rates = Rates(bytes_s=1e3, flops_s=1e4)

    def test_a_slower_pass_says_nothing(self):
        assert self.rates.raised_by(self.work, 14.03) == self.rates
        assert self.rates.raised_by(self.work, 20.0) == self.rates

    @pytest.mark.parametrize("seconds", [14.0, 11.0, 9.0, 0.01])
    def test_a_faster_pass_is_the_floor(self, seconds: float):
        raised = self.rates.raised_by(self.work, seconds)
        assert self.work.floor_s(raised) == pytest.approx(seconds)
        assert raised.bytes_s >= self.rates.bytes_s
        assert raised.flops_s >= self.rates.flops_s

    def test_what_the_floor_is_made_of_is_raised(self):
        arithmetic = self.rates.raised_by(self.work, 9.0)
        assert arithmetic.bytes_s == self.rates.bytes_s
        memory = Work((Layer(100, 10, 4000, rows=1),), 30)
        assert memory.floor_s(self.rates) == pytest.approx(4.03)
        assert memory.read_s(self.rates) == pytest.approx(4.03)
        assert self.rates.raised_by(memory, 3.0).flops_s == self.rates.flops_s

    def test_the_best_of_two(self):
        other = Rates(bytes_s=2e3, flops_s=1e3)
        assert self.rates.best_of(other) == Rates(bytes_s=2e3, flops_s=1e4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_are_read_as_they_lie_then(weights: Weights):
    model = tiny.model(torch.bfloat16, hidden_size=64, intermediate_size=128)
    whole, found = work_of(model, 5), work_of(model, 5, weights)
    assert found.other_bytes == whole.other_bytes
    assert [layer.flops for layer in found.layers] == [layer.flops for layer in whole.layers]
    *layers, head = found.layers
    assert head.weight_bytes == head.n * (head.k + 4), "in int8 whatever was asked for"
    for layer in layers:
        group = layer.k // 64 * 2
        expected = layer.k + 4 if weights == "int8" else layer.k // 2 + group
        assert layer.weight_bytes == layer.n * expected


def test_rates_are_plausible():
    probes = Probes(torch.float32)
    timings = interleave(probes.calls(), clock=THREAD_CPU_TIME, budget_s=0.01, repeats=3)
    assert set(timings) == {READ, GEMM, REGISTERS}
    rates = probes.rates(timings)
    assert 1e9 < rates.bytes_s < 1e13
    assert 1e9 < rates.flops_s < 1e14


def test_activations_in_int8_have_a_peak_of_their_own():
    probes = Probes(torch.bfloat16, 1 << 20, "int8")
    assert probes.read_bytes == 1 << 20
    timings = interleave(probes.calls(), clock=THREAD_CPU_TIME, budget_s=0.01, repeats=3)
    assert set(timings) == {READ, GEMM, REGISTERS, FP32_REGISTERS}
    assert 1e9 < probes.rates(timings).flops_s < 1e14
