"""A layer that holds a packed weight: what it stands for, and what changing its dtype leaves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from splitpoint import kernels
from splitpoint.kernels.int4 import (
    INT4_FORMATS,
    Int4Format,
    dequantize_int4,
    int4_format,
    pack_int4,
    quantize_int4,
)
from splitpoint.kernels.layout import quantize
from splitpoint.kernels.packed_linear import PackedLinear, scales_as_exact


def int4(n: int, k: int, order: Tensor | None = None) -> tuple[PackedLinear, Tensor]:
    """A layer with a bias, and its weight [n, k]."""
    values, scales, _ = quantize_int4(torch.randn(n, k), 32)
    layer = PackedLinear(pack_int4(values, scales), n, k, bias=torch.randn(n), order=order)
    return layer, dequantize_int4(values, scales)


def int8(n: int, k: int) -> tuple[PackedLinear, Tensor]:
    kernels.load()
    values, scale = quantize(torch.randn(n, k))
    packed = torch.ops.splitpoint.pack_weight(values)
    return PackedLinear(packed, n, k, scale), values * scale[:, None]


def test_it_computes_with_what_it_stands_for() -> None:
    for layer, weight in (int4(40, 96), int8(40, 33)):
        x = torch.randn(2, 3, layer.in_features)
        bias = 0 if layer.bias is None else layer.bias.double()
        expected = x.double() @ weight.double().t() + bias
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.weight(torch.float32), weight)
        assert torch.equal(layer.weight(torch.bfloat16), weight.to(torch.bfloat16))


def test_columns_in_another_order() -> None:
    order = torch.randperm(96)
    layer, weight = int4(40, 96, order)
    x = torch.randn(3, 96)
    expected = x[:, order].double() @ weight.double().t() + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    turned = layer.weight(torch.float32).double()
    torch.testing.assert_close(x.double() @ turned.t() + layer.bias.double(), expected)


def test_a_dtype_is_for_computing_and_not_for_weights() -> None:
    for layer, weight in (int4(40, 96), int8(40, 33)):
        other = copy.deepcopy(layer).to(torch.bfloat16)
        assert other(torch.randn(1, layer.in_features).to(torch.bfloat16)).dtype == torch.bfloat16
        assert torch.equal(other.weight(torch.float32), weight)
        state = layer.state_dict()
        assert all(
            torch.equal(state[name], each)
            for name, each in other.float().state_dict().items()
            if name != "bias"
        )


def test_scales_are_narrow_where_that_is_exact() -> None:
    narrow = torch.randn(3, 5).to(torch.bfloat16)
    assert scales_as_exact(narrow.float()).dtype == torch.bfloat16
    wide = torch.tensor([1.0, 1 + 2.0**-10]).half()
    assert torch.equal(scales_as_exact(wide), wide.float())


def test_formats_are_told_apart_by_their_bytes() -> None:
    assert {int4_format(made.shape(70, 128)) for made in INT4_FORMATS} == {*INT4_FORMATS}
    assert int4_format((1, 1, 99)) is None
    assert int4_format((64, 64)) is None
    assert str(Int4Format(64, True, True)) == "int4_64_zeros_wide"


def test_what_is_printed() -> None:
    assert str(int4(8, 32)[0]) == "PackedLinear(32, 8, 4 bits, bias=True)"
    assert str(int8(8, 32)[0]) == "PackedLinear(32, 8, 8 bits, bias=False)"
