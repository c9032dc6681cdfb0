"""Measuring one layer: what is timed is right, and what is wrong is not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitpoint.bench.linear import LayerRow, _verify, measure_layer
from splitpoint.errors import OutputMismatch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_variant_is_timed_at_every_size(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    how: dict[str, Any] = {"threads": 1, "cold": False, "budget_s": 0.01}
    rows = measure_layer(40, 33, dtype, [1, 20], weights="int8", **how)
    assert torch.get_num_threads() == threads
    by_size: dict[int, dict[str, LayerRow]] = {1: {}, 20: {}}
    for row in rows:
        by_size[row.size][row.variant] = row
    assert {"linear", "gemv", "packed", "int8", "int8_dynamic"} <= set(by_size[1])
    assert "gemv" not in by_size[20], "out of its depth at 20 tokens"
    for row in rows:
        assert (row.n, row.k, row.threads) == (40, 33, 1)
        assert row.dtype == str(dtype).removeprefix("torch.")
        assert row.timing.median_s > 0
        linear = by_size[row.size]["linear"]
        assert row.over_linear == pytest.approx(linear.timing.median_s / row.timing.median_s)
    packed = by_size[1]["packed"]
    # 40 rows are two blocks of 32; 33 k's are 17 pairs in bfloat16.
    assert packed.weight_bytes == (64 * 34 * 2 if dtype == torch.bfloat16 else 64 * 33 * 4)
    assert 1e9 < packed.weight_bytes / packed.floor_s < 1e13
    assert packed.floor_share == pytest.approx(packed.floor_s / packed.timing.median_s)


def test_four_bits_are_timed_where_groups_divide_k() -> None:
    how: dict[str, Any] = {"cold": False, "budget_s": 0.01}
    rows = measure_layer(40, 64, torch.bfloat16, [1, 40], weights="int4", **how)
    (one,) = (row for row in rows if row.variant == "int4" and row.size == 1)
    assert one.weight_bytes == 64 * 64 * 4.25 / 8  # two blocks, a scale each 64
    with pytest.raises(ValueError, match="k = 33"):
        measure_layer(40, 33, torch.bfloat16, [1], weights="int4", **how)


@pytest.mark.parametrize("cold", [True, False])
def test_nothing_is_above_the_floor(cold: bool) -> None:
    rows = measure_layer(256, 512, torch.bfloat16, [1, 3], weights="int4", cold=cold, budget_s=0.01)
    assert {row.variant for row in rows} >= {"linear", "gemv", "packed", "int4"}
    assert not [row.variant for row in rows if row.variant.startswith("read")]
    assert all(1e9 < row.weight_bytes / row.floor_s < 1e13 for row in rows)
    assert all(0 < row.floor_share <= 1 for row in rows)
    rates = {row.weight_bytes / row.floor_s for row in rows}
    if cold:
        assert max(rates) == pytest.approx(min(rates)), "all weights lie in memory"


def test_an_output_that_rounding_does_not_explain_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    weight = torch.randn(8, 64, generator=generator).bfloat16()
    y = (x.double() @ weight.double().t()).bfloat16()
    _verify("right", y, x, weight)
    # One token's output off by 2 %, ten times bfloat16's rounding.
    y[1, 5] *= 1.02
    with pytest.raises(OutputMismatch, match=r"'wrong' at size 3 of a \(8, 64\) layer"):
        _verify("wrong", y, x, weight)
    y[1, 5] = torch.nan
    with pytest.raises(OutputMismatch, match="inf times"):
        _verify("wrong", y, x, weight)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        measure_layer(4, 4, torch.float64, [1])
