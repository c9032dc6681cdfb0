"""Modules that hold packed weights: every range computes with them as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitpoint import Config, compile, kernels
from splitpoint.errors import NotBatchInvariant
from splitpoint.kernels.int4 import INT4_FORMATS, Int4Format, pack_int4, quantize_int4
from splitpoint.kernels.layout import quantize
from splitpoint.kernels.packed_linear import PackedLinear
from splitpoint.passes.linear_sites import LinearShape
from splitpoint.ranges import Range
from splitpoint.tuning.linear import INDUCTOR, LinearTuner

SIZES = (1, 7, 8, 9, 40, 64)
PLAN: dict[str, Any] = {"max_size": 64, "split_points": [8], "cache_dir": ""}


def int4(n: int, k: int, made: Int4Format, bias: bool = False, order: bool = False) -> PackedLinear:
    values, scales, zeros = quantize_int4(torch.randn(n, k) / k**0.5, made.group, made.zero_points)
    if made.wide_scales:
        scales = (scales * (1 + torch.rand_like(scales, dtype=torch.float32) / 256)).float()
    return PackedLinear(
        pack_int4(values, scales, zeros),
        n,
        k,
        bias=torch.randn(n) if bias else None,
        order=torch.randperm(k) if order else None,
    )


def int8(n: int, k: int, bias: bool = False) -> PackedLinear:
    values, scale = quantize(torch.randn(n, k) / k**0.5)
    packed = torch.ops.splitpoint.pack_weight(values)
    return PackedLinear(packed, n, k, scale, torch.randn(n) if bias else None)


class Model(nn.Module):
    """Layers in all forms: joined, gated, with a bias and a residual, permuted, in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        kernels.load()
        joined = Int4Format(64, True, True)
        self.q, self.k = int4(96, 192, joined, bias=True), int4(64, 192, joined, bias=True)
        self.gate, self.up = int4(256, 160, Int4Format(32)), int4(256, 160, Int4Format(32))
        self.down = int4(192, 256, Int4Format(128, wide_scales=True), bias=True)
        self.permuted = int4(64, 192, Int4Format(64), order=True)
        self.head = int8(300, 64, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.q(x), self.k(x)], 1)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.permuted(x))


class Dense(nn.Module):
    """The same with the weights in float64."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        for name, layer in model.named_children():
            weight = layer.weight(torch.float32).double()
            made = nn.Linear(*reversed(weight.shape), bias=layer.bias is not None)
            made.weight = nn.Parameter(weight)
            if layer.bias is not None:
                made.bias = nn.Parameter(layer.bias.double())
            setattr(self, name, made)

    forward = Model.forward


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model().to(dtype).eval().requires_grad_(False)


def x(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, 192, generator=torch.Generator().manual_seed(size)).to(dtype)


def assert_close(compiled: Any, module: Any, dtype: torch.dtype = torch.float32) -> None:
    """In bf16, no further from float64 than the same model is with its weights in bf16."""
    exact = Dense(module)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    for size in SIZES:
        given = x(size, dtype)
        right = exact(given.double())
        error = (compiled(given).double() - right).abs()
        if dtype == torch.float32:
            assert error.max() < 1e-4, size
        else:
            plain = (rounded(given).double() - right).abs()
            assert error.max() <= 1.25 * plain.max(), size
            assert error.square().mean() <= 1.1 * plain.square().mean(), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"linear": "inductor"}, {"backend": "eager"}], ids=str)
def test_every_range_computes_with_packed_weights(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    module = make(dtype)
    assert_close(module, module, dtype)
    compiled = compile(module, Config(**PLAN, **settings))
    assert_close(compiled, module, dtype)
    for entry in compiled.plan.entries:
        chosen = {
            "192->96+64",
            "160->silu(256)*256",
            "256->192 +residual",
            "192->64",
            "64->300",
        }
        if settings:
            assert not entry.linear
        else:
            assert set(entry.linear) == chosen
            assert set(entry.linear.values()) <= {"packed", "unpacked"}


def test_a_copy_and_other_weights_in_the_same_layers() -> None:
    module, other = make(), make(seed=1)
    compiled = compile(module, Config(**PLAN))
    compiled(x(3))
    module.load_state_dict(other.state_dict())
    assert_close(compiled, other)
    assert_close(copy.deepcopy(module), other)


def test_they_are_not_rounded_again_and_not_freed() -> None:
    module = make()
    for weights in ("int8", "int4"):
        config = Config(**PLAN, weights=weights, free_original_weights=True)
        compiled = compile(module, config)
        assert_close(compiled, module)
        assert compiled.stats().packed_bytes < 10_000  # the scales of the layer of 8 bits
        assert all("not in" not in entry.note for entry in compiled.plan.entries)


def test_a_start_from_the_store(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        module = make()
        compiled = compile(module, Config(**PLAN | {"cache_dir": str(tmp_path)}))
        results.append([compiled(x(size)) for size in SIZES])
    assert compiled.stats().compilations == 0
    assert all(map(torch.equal, *results))
    assert_close(compiled, module)


@pytest.mark.parametrize("instruction_set", ["avx512_bf16", "avx2", "portable"])
@pytest.mark.parametrize("packed", ["int8", *map(str, INT4_FORMATS)])
def test_variants_are_right_as_the_tuner_sees_it(packed: str, instruction_set: str) -> None:
    if instruction_set not in kernels.instruction_sets():
        pytest.skip("not on this CPU")
    kernels.use_instruction_set(instruction_set)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            shape = LinearShape((140, 70), 256, dtype, True, int8=packed == "int8", packed=packed)
            tuner = LinearTuner(1)
            seconds = tuner.seconds(shape, 40, ["packed", "unpacked"])
            assert seconds is not None
            assert all(each < 1 for each in seconds.values())
            assert tuner.choose(shape, Range(33, 64)) != INDUCTOR
    finally:
        kernels.use_instruction_set("best")


def test_batch_invariant_takes_8_bits_and_refuses_4() -> None:
    config = Config(max_size=40, cache_dir="", batch_invariant=True)
    with pytest.raises(NotBatchInvariant, match=r"no kernel of .* in 4 bits there is none"):
        compile(make(), config)(x(3))
    compiled = compile(int8(64, 192, bias=True).eval(), config)
    whole = compiled(x(40))
    for size in (1, 3, 15):
        assert torch.equal(compiled(x(40)[:size]), whole[:size])
