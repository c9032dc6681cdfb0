"""`Config.weights`: models whose weights are rounded when they are compiled."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitpoint import Config, compile, kernels
from splitpoint.errors import InvalidField
from splitpoint.passes.linear import LAYOUTS, VARIANTS, rounded
from splitpoint.passes.linear_sites import LinearShape
from splitpoint.ranges import Range
from splitpoint.runtime.freed_weights import is_freed
from splitpoint.tuning.linear import LinearTuner

SIZES = (1, 7, 8, 9, 40, 64)
PLAN: dict[str, Any] = {"max_size": 64, "split_points": [8], "cache_dir": ""}


class Model(nn.Module):
    """Layers in all forms: joined, gated, with a bias and a residual, transposed, a head, and one
    whose inputs no group divides."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(192, 96)
        self.k = nn.Linear(192, 64)
        self.gate = nn.Linear(160, 256, bias=False)
        self.up = nn.Linear(160, 256, bias=False)
        self.down = nn.Linear(256, 192)
        self.turned = nn.Parameter(torch.randn(192, 64) / 14)
        self.odd = nn.Linear(33, 64)
        self.head = nn.Linear(64, 300, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.q(x), self.k(x)], 1)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        x = x @ self.turned
        return self.head(x + self.odd(x[:, :33]))


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model().to(dtype).eval().requires_grad_(False)


def made(module: Any, weights: str, **settings: Any) -> Any:
    return compile(module, Config(**PLAN | {"weights": weights} | settings))


def reference(module: Any, weights: str) -> Any:
    """The module with its weights rounded, by name, in float64."""
    other = copy.deepcopy(module).double()
    for name, weight in module.named_parameters():
        if weight.dim() == 2:
            kind = "int8" if name == "head.weight" else weights
            turned = weight.t() if name == "turned" else weight
            values = rounded(turned, kind)
            other.get_parameter(name).data = (values.t() if name == "turned" else values).double()
    return other


def x(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, 192, generator=torch.Generator().manual_seed(size)).to(dtype)


def assert_close(compiled: Any, module: Any, weights: str, dtype: torch.dtype) -> None:
    exact = reference(module, weights)
    for size in SIZES:
        given = x(size, dtype)
        error = (compiled(given).double() - exact(given.double())).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.06), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_range_computes_with_rounded_weights(weights: str, dtype: torch.dtype) -> None:
    module = make(dtype)
    compiled = made(module, weights)
    assert_close(compiled, module, weights, dtype)
    for entry in compiled.plan.entries:
        chosen = dict(entry.linear)
        stays = {"33->64 +residual"} if weights == "int4" else set()
        assert {shape for shape, name in chosen.items() if name == "inductor"} == stays
        head = chosen.pop("64->300")
        assert head.startswith("int8")
        assert {name.split("_")[0] for name in chosen.values()} <= {weights, "inductor"}
        if weights == "int4":
            assert "not in int4: 33->64 +residual (no group of 64 or 32 divides 33)" in entry.note
        else:
            assert entry.note == ""
    whole = sum(p.nbytes for p in module.parameters() if p.dim() == 2)
    share = {"int8": 1, "int4": 0.6}[weights] / dtype.itemsize
    assert 0 < compiled.stats().packed_bytes < 1.1 * share * whole
    assert str(compiled.plan).count(weights) >= 2


def test_other_rounding_than_asked_for_would_show() -> None:
    module, other = make(), x(7)
    exact = {kind: reference(module, kind)(other.double()) for kind in ("int8", "int4")}
    assert (exact["int8"] - exact["int4"]).abs().max() > 0.05
    assert (exact["int8"] - module(other).double()).abs().max() > 1e-3


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_is_updated_is_rounded_anew(weights: str) -> None:
    module = make()
    compiled = made(module, weights)
    compiled(x(1))
    module.down.weight.mul_(2)
    module.up.weight.data = torch.randn(256, 160) / 12
    module.head.weight = nn.Parameter(torch.randn(300, 64) / 8, requires_grad=False)
    assert_close(compiled, module, weights, torch.float32)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_originals_can_be_freed(weights: str) -> None:
    module, kept = make(), make()
    compiled = made(module, weights, free_original_weights=True)
    compiled(x(1))
    names = {name for name, each in module.named_parameters() if is_freed(each)}
    matrices = {name for name, each in kept.named_parameters() if each.dim() == 2}
    assert names == matrices - ({"odd.weight"} if weights == "int4" else set())
    assert_close(compiled, kept, weights, torch.float32)
    other = make(seed=1)
    module.load_state_dict(other.state_dict())
    assert_close(compiled, other, weights, torch.float32)


def test_a_start_from_the_store_rounds_alike_and_other_weights_are_another_model(
    tmp_path: Path,
) -> None:
    results, stats = {}, {}
    for name in ("int4", "int8", "int4 again", "none"):
        weights = None if name == "none" else name.split()[0]
        compiled = compile(make(), Config(**PLAN | {"cache_dir": str(tmp_path)}, weights=weights))
        results[name] = [compiled(x(size)) for size in SIZES]
        stats[name] = compiled.stats()
    assert all(map(torch.equal, results["int4"], results["int4 again"]))
    assert not torch.equal(results["int4"][0], results["int8"][0])
    assert not torch.equal(results["int8"][0], results["none"][0])
    assert stats["int4 again"].compilations == 0
    assert stats["int4 again"].packed_bytes == stats["int4"].packed_bytes


def test_no_room_for_copies_is_said() -> None:
    compiled = made(make(), "int8", max_packed_bytes=0)
    torch.testing.assert_close(compiled(x(3)), make()(x(3)), rtol=1e-4, atol=1e-4)
    assert all("a copy would exceed max_packed_bytes" in e.note for e in compiled.plan.entries)
    assert compiled.stats().packed_bytes == 0


def test_weights_that_are_int8_already_stay() -> None:
    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-9, 9, (64, 192), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight.to(x.dtype)) * self.scale

    compiled = made(Int8(), "int4")
    torch.testing.assert_close(compiled(x(4)), compiled.module(x(4)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, each in VARIANTS.items() if each.weights])
@pytest.mark.parametrize("instruction_set", ["avx512_bf16", "avx2", "portable"])
def test_variants_are_right_as_the_tuner_sees_it(name: str, instruction_set: str) -> None:
    if instruction_set not in kernels.instruction_sets():
        pytest.skip("not on this CPU")
    kernels.use_instruction_set(instruction_set)
    try:
        tuner = LinearTuner(threads=1)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in (
                LinearShape((100, 70), 192, dtype, bias=True, transposed=True),
                LinearShape((96, 96), 320, dtype, activation="silu", gated=True),
                LinearShape((33,), 64, dtype, activation="gelu", residual=True),
            ):
                for rows in (1, 20):
                    assert tuner.seconds(shape, rows, [name])[name] < float("inf")
    finally:
        kernels.use_instruction_set("best")


def test_a_wrong_kernel_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.load()
    shape = LinearShape((512,), 256, torch.float32)
    for name in ("int8", "int8_unpacked"):
        wrong = dataclasses.replace(
            VARIANTS[name], run=lambda x, layers: [x.new_zeros(x.shape[0], 512)]
        )
        monkeypatch.setitem(VARIANTS, name, wrong)
        chosen = LinearTuner(threads=1).choose(shape, Range(9, 64), weights="int8")
        assert chosen == ("int8_unpacked" if name == "int8" else "inductor")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "int3"}, "weights must be one of 'int8', 'int4', got 'int3'"),
        ({"weights": "int8", "linear": "inductor"}, "so linear must be 'auto'"),
        ({"weights": "int8", "backend": "eager"}, "backend='eager'"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidField, match=said):
        Config(**given)
    assert Config.from_json(Config(weights="int4").to_json()) == Config(weights="int4")


def test_layouts_are_as_large_as_they_say() -> None:
    kernels.load()
    for name in ("int8", "int8_scales", "int4_32", "int4_64_t"):
        layout = LAYOUTS[name]
        weight = torch.randn(128, 70) if name.endswith("_t") else torch.randn(70, 128)
        packed = layout.pack(weight)
        assert tuple(packed.shape) == layout.shape(70, 128, torch.float32)
        assert packed.dtype == layout.dtype
