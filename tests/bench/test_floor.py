"""The floor of a forward pass: what is counted, and at what rates."""

from __future__ import annotations

import pytest
import torch

from splitpoint.bench.floor import GEMM, READ, REGISTERS, Layer, Probes, Rates, Work, work_of
from splitpoint.tuning.measure import THREAD_CPU_TIME, interleave

from .. import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_is_counted_with_its_rows(dtype: torch.dtype):
    model = tiny.model(dtype)
    work = work_of(model, 5)
    assert len(work.layers) == 7 * tiny.LAYERS + 1
    *layers, head = work.layers
    assert {layer.rows for layer in layers} == {5}
    assert head.rows == 1, "the logits of the last token only"
    assert (head.n, head.k, head.itemsize) == (tiny.VOCABULARY, tiny.HIDDEN, dtype.itemsize)
    everything = sum(p.nbytes for p in model.parameters())  # tied: the head is the embedding
    assert sum(layer.weight_bytes for layer in work.layers) + work.other_bytes == everything
    assert work.other_bytes == (2 * tiny.LAYERS + 1) * tiny.HIDDEN * dtype.itemsize, "the norms"
    assert not any(module._forward_hooks for module in model.modules())


def test_each_layer_takes_the_longer_of_its_two_times():
    # 4000 bytes each, and 2000 operations a row.
    work = Work((Layer(100, 10, 4, rows=1), Layer(100, 10, 4, rows=50)), other_bytes=30)
    assert work.floor_s(Rates(bytes_s=1e3, flops_s=1e4)) == pytest.approx(4 + 10 + 0.03)


def test_rates_are_plausible():
    probes = Probes(torch.float32)
    timings = interleave(probes.calls(), clock=THREAD_CPU_TIME, budget_s=0.01, repeats=3)
    assert set(timings) == {READ, GEMM, REGISTERS}
    rates = probes.rates(timings)
    assert 1e9 < rates.bytes_s < 1e13
    assert 1e9 < rates.flops_s < 1e14
