"""torchao's quantised layers on this package's kernels: the same results, or a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import splitpoint
from splitpoint import Config
from splitpoint.errors import UnsupportedModel

pytest.importorskip("torchao")

from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    quantize_,
)

from splitpoint.integrations.torchao import Int8Linear, convert


def make(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layers = nn.Linear(192, 256), nn.SiLU(), nn.Linear(256, 96, bias=False)
    return nn.Sequential(*layers).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_are_torchaos(dtype: torch.dtype) -> None:
    model = make(dtype)
    quantize_(model, Int8WeightOnlyConfig())
    inputs = [torch.randn(size, 192).to(dtype) for size in (1, 5, 40)]
    expected = [model(x) for x in inputs]
    values = model[0].weight.qdata
    assert convert(model) is model
    assert isinstance(model[2], Int8Linear)
    assert model[0].weight.data_ptr() == values.data_ptr()
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(model(x), y)
    config = Config(max_size=64, cache_dir="", linear={"1-64": "packed"})
    compiled = splitpoint.compile(model, config)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(compiled(x), y, **close)
    assert set(compiled.plan.entries[0].linear.values()) == {"packed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("bits", "granularity", "mapping"),
    [
        (torch.int4, PerGroup(32), MappingType.SYMMETRIC),
        (torch.int4, PerGroup(64), MappingType.ASYMMETRIC),
        (torch.int4, PerAxis(0), MappingType.ASYMMETRIC),
        (torch.int3, PerGroup(64), MappingType.SYMMETRIC),
        (torch.int8, PerAxis(0), MappingType.SYMMETRIC),
    ],
    ids=str,
)
def test_values_of_1_to_8_bits(
    bits: torch.dtype, granularity: Any, mapping: MappingType, dtype: torch.dtype
) -> None:
    model = make(dtype)
    quantize_(model, IntxWeightOnlyConfig(bits, granularity, mapping))
    exact = [model[index].weight for index in (0, 2)]
    inputs = [torch.randn(size, 192).to(dtype) for size in (1, 5, 40)]
    expected = [model(x) for x in inputs]
    convert(model)
    for index, weight in zip((0, 2), exact, strict=True):
        group = weight.block_size[1]
        off = weight.qdata.double() - weight.zero_point.double().repeat_interleave(group, 1)
        values = off * weight.scale.double().repeat_interleave(group, 1)
        assert torch.equal(model[index].weight(torch.float32), values.float())
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    compiled = splitpoint.compile(model, Config(max_size=64, cache_dir=""))
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(x), y, **close)
        torch.testing.assert_close(compiled(x), y, **close)
    assert set(compiled.plan.entries[0].linear.values()) <= {"packed", "unpacked"}


def test_other_formats_are_refused_by_name_and_change_nothing() -> None:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    asymmetric = MappingType.ASYMMETRIC
    for config, kind, says in (
        (Int8DynamicActivationInt8WeightConfig(), "Int8Tensor", "rounds or scales activations"),
        (Int8WeightOnlyConfig(granularity=PerGroup(64)), "Int8Tensor", "a factor for each"),
        (Int8DynamicActivationIntxWeightConfig(), "Intx.*", "rounds or scales activations"),
        (IntxWeightOnlyConfig(torch.int4, PerGroup(16)), "Intx.*", "groups of 16"),
        (IntxWeightOnlyConfig(torch.int8, PerGroup(32)), "Intx.*", "6 scales a row"),
        (IntxWeightOnlyConfig(torch.int8, PerAxis(0), asymmetric), "Intx.*", "zero points"),
        (PrototypeInt4WeightOnlyConfig(group_size=64), "Int4OpaqueTensor", "no whole steps"),
    ):
        model = make()
        quantize_(model, config)
        with pytest.raises(UnsupportedModel, match=rf"0\.weight is a {kind} .* {says}") as caught:
            convert(model)
        assert len(str(caught.value).splitlines()) <= 3
        assert all(type(model[index]) is nn.Linear for index in (0, 2))


def test_one_layer_and_layers_that_are_shared() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    quantize_(layer, Int8WeightOnlyConfig())
    model = nn.ModuleList([layer, nn.Sequential(layer)])
    convert(model)
    assert model[0] is model[1][0]
    alone = make()[0]
    quantize_(alone, Int8WeightOnlyConfig())
    assert isinstance(convert(alone), Int8Linear)
    plain = make()
    assert convert(plain) is plain
    assert type(plain[0]) is nn.Linear
