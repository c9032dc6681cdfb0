"""The floor of a forward pass: what is counted, and at what rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import splitpoint.integrations.transformers as sp
from splitpoint.bench.floor import GEMM, READ, REGISTERS, Layer, Probes, Rates, Work, work_of
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


def test_rates_are_plausible():
    probes = Probes(torch.float32)
    timings = interleave(probes.calls(), clock=THREAD_CPU_TIME, budget_s=0.01, repeats=3)
    assert set(timings) == {READ, GEMM, REGISTERS}
    rates = probes.rates(timings)
    assert 1e9 < rates.bytes_s < 1e13
    assert 1e9 < rates.flops_s < 1e14
