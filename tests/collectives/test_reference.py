"""The reference's local half: what defines the quantisations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitpoint.collectives import reference
from splitpoint.errors import InvalidCollective

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def unpacked(quantised: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([quantised & 15, quantised >> 4], -1).flatten(-2).long()
    return FP4[codes & 7] * torch.where(codes > 7, -1.0, 1.0)


def test_norm_is_that_of_torch() -> None:
    x, weight = torch.randn(5, 96), torch.randn(96)
    got = reference.finish(x, None, weight, None, eps=1e-5)
    torch.testing.assert_close(got.norm, torch.nn.functional.rms_norm(x, [96], weight, 1e-5))
    assert torch.equal(got.residual, x)


def test_weight_bias_and_wide_residual() -> None:
    x, residual = torch.randn(5, 96).bfloat16(), torch.randn(5, 96)
    weight = torch.randn(96).bfloat16()
    got = reference.finish(x, residual, weight, None, eps=1e-5, weight_bias=1.0)
    total = x.float() + residual
    assert torch.equal(got.residual, total)
    expected = torch.nn.functional.rms_norm(total, [96], weight.float() + 1, 1e-5)
    torch.testing.assert_close(got.norm, expected.bfloat16(), rtol=0.01, atol=0.01)


def test_norm_is_of_the_sum_as_it_is_returned() -> None:
    # 1 + 2**-9 is rounded to 1 in bfloat16, and 1 + 3 * 2**-9 to 1 + 2**-7.
    x = torch.tensor([[2**-9, 3 * 2**-9, 0.0, 0.0]]).bfloat16()
    got = reference.finish(x, torch.ones(1, 4).bfloat16(), torch.full((4,), 64.0), None, eps=0.0)
    assert got.residual.tolist() == [[1, 1 + 2**-7, 1, 1]]
    mean_square = (1 + x.double()).square().mean()
    exact = got.residual.double() * 64 / mean_square.sqrt()
    assert torch.equal(got.norm, exact.bfloat16())
    assert not torch.equal(got.norm, ((1 + x.double()) * 64 / mean_square.sqrt()).bfloat16())


def test_fp8_token_scales_each_row_by_its_largest() -> None:
    norm = torch.tensor([[1.0, -2.0, 0.5, 448.0], [0.0, 0.0, 0.0, 0.0], [1e-3, 2e-3, -4e-3, 0.0]])
    quantised, scales = reference.quantise(norm, None, "fp8_token")
    assert torch.equal(scales, norm.abs().amax(-1, keepdim=True) / 448)
    assert scales[0] == 1
    assert torch.equal(quantised.float()[0], norm[0])
    assert torch.equal(quantised.float()[1], norm[1])
    assert quantised.float()[2].abs().max() == 448


def test_fp8_static_clamps_and_keeps_nan() -> None:
    norm = torch.tensor([[1e6, -1e6, torch.inf, torch.nan, 3.0]])
    quantised, scales = reference.quantise(norm, torch.tensor(2.0), "fp8_static")
    assert quantised.float()[0, :3].tolist() == [448, -448, 448]
    assert quantised.float()[0, 3].isnan()
    assert quantised.float()[0, 4] == 1.5
    assert scales.shape == (0,)


def test_fp4_rounds_ties_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    norm = torch.cat([ties, -ties])[None]
    # The largest is 6, so a global scale of 1 makes the block's scale 1.
    quantised, scales = reference.quantise(norm, torch.tensor(1.0), "nvfp4")
    assert scales.float().tolist() == [[1.0]]
    even = torch.tensor([0.0, 1, 1, 2, 2, 4, 4, 6])
    assert torch.equal(unpacked(quantised)[0], torch.cat([even, -even]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([16, 64, 240]), st.sampled_from([1e-2, 1.0, 50.0]))
def test_fp4_gives_each_value_its_nearest(seed: int, hidden: int, scale: float) -> None:
    norm = torch.randn(3, hidden, generator=torch.Generator().manual_seed(seed)) * scale
    whole = torch.tensor(448 * 6 / float(norm.abs().max()))
    quantised, scales = reference.quantise(norm, whole, "nvfp4")
    steps = (scales.float() / whole).repeat_interleave(16, -1)
    choices = torch.cat([FP4, -FP4]) * steps[..., None]
    nearest = (choices - norm[..., None]).abs().amin(-1)
    error = (unpacked(quantised) * steps - norm).abs()
    # A scale rounded down may leave values beyond 6; equal up to the rounding of products.
    assert torch.all(error <= nearest * (1 + 1e-4) + 1e-5 * steps)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": torch.zeros(2, 64, dtype=torch.float64)}, "input must be"),
        ({"weight": torch.zeros(63)}, "weight must be"),
        ({"residual": torch.zeros(2, 63)}, "residual must have"),
        ({"residual": torch.zeros(2, 64).half()}, "residual must have"),
        ({"quant": "int4"}, "quant must be one of"),
        ({"quant": "fp8_static"}, "quant_scale goes with"),
        ({"quant_scale": torch.ones(())}, "quant_scale goes with"),
        ({"quant": "nvfp4", "quant_scale": torch.ones(2)}, "must be one float32"),
        (
            {
                "input": torch.zeros(2, 24),
                "weight": torch.ones(24),
                "quant": "nvfp4",
                "quant_scale": torch.ones(()),
            },
            "multiple of 16",
        ),
    ],
)
def test_arguments_without_a_meaning(change: dict[str, object], said: str) -> None:
    arguments = {
        "input": torch.zeros(2, 64),
        "residual": None,
        "weight": torch.ones(64),
        "quant_scale": None,
        "quant": "none",
    } | change
    with pytest.raises(InvalidCollective, match=said):
        reference.check(**arguments)
