"""Models of which several dimensions change from call to call."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitpoint import Config, compile, errors

NAMED: Any = {"x": {0: "batch", 1: "length"}}
MOST = {"batch": 6, "length": 40}
CONFIG = Config(max_size=128, split_points=[16, 64], cache_dir="")
PLAIN = Config(max_size=128, split_points=[16, 64], cache_dir="", backend="eager")
SHAPES = [
    (3, 7), (1, 1), (1, 5), (5, 1), (2, 2), (2, 8), (1, 16), (1, 17), (6, 1), (4, 16), (5, 13),
    (3, 40), (1, 40), (6, 21), (3, 3),
]  # fmt: skip
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


class Encoder(nn.Module):
    """What an encoder has: an embedding, attention with a mask, norms, layers, a mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.at = nn.Embedding(64, 32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.register_buffer("positions", torch.arange(64))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        batch, length = x.shape
        assert isinstance(self.positions, torch.Tensor)
        h = self.embed(x) + self.at(self.positions[:length])
        q, k, v = (
            each.view(batch, length, 4, 8).transpose(1, 2) for each in self.qkv(h).chunk(3, -1)
        )
        allowed = None if mask is None else mask[:, None, None, :].bool()
        h = self.norm(
            h
            + self.out(F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2))
        )
        h = h + self.down(F.gelu(self.up(h)))
        if mask is None:
            return h, h[:, 0]
        weights = mask[..., None].float()
        return h, (h * weights).sum(1) / weights.sum(1)


def encoder() -> Encoder:
    return Encoder().eval().requires_grad_(False)


def encoder_call(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.rand(batch, length) > 0.3
    mask[:, 0] = True
    return torch.randint(0, 50, (batch, length)), mask


BOTH: Any = {"x": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["native", "python"])
def test_an_encoder_at_every_shape_cold_and_warm(tmp_path: Path, runner: Any) -> None:
    model = encoder()
    config = Config(max_size=128, split_points=[16, 64], cache_dir=str(tmp_path), runner=runner)
    for warm in (False, True):
        compiled = compile(model, config, dynamic_dims=BOTH, max_dims=MOST)
        for (batch, length), mode in itertools.product(SHAPES, MODES):
            x, mask = encoder_call(batch, length)
            with mode():
                torch.testing.assert_close(compiled(x, mask), model(x, mask), rtol=1e-4, atol=1e-4)
        stats = compiled.stats()
        assert (stats.compilations == 0) is warm
        assert stats.eager_calls == 0
        assert sum(stats.dispatches.values()) == len(SHAPES) * len(MODES)
        ranges = {str(entry.range) for entry in compiled.plan.entries}
        assert ranges == {"[1,16]", "[17,64]", "[65,128]"}
    text = str(compiled.plan)
    assert re.search(r"batch [12]-6, length 2-16", text)  # torch 2.11 asks whether batch is 1
    assert type(compiled.plan).from_json(compiled.plan.to_json()) == compiled.plan


def test_nothing_is_compiled_after_the_first_call() -> None:
    model = encoder()
    compiled = compile(model, CONFIG, dynamic_dims=BOTH, max_dims=MOST)
    compiled(*encoder_call(3, 7))
    before = compiled.stats().compilations
    for shape in SHAPES:
        compiled(*encoder_call(*shape))
    assert compiled.stats().compilations == before


def test_branches_on_both_dimensions_have_their_own_graphs() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            x = x * 3
        elif x.shape[1] > 10:
            x = x.flip(1)
        if x.shape[0] * x.shape[1] == 21:
            x = x + 100
        return x.cumsum(1) + x.shape[1]

    compiled = compile(model, PLAIN, dynamic_dims=NAMED, max_dims=MOST)
    for batch, length in [*SHAPES, *itertools.product((1, 2, 3, 7 % 6), (7, 10, 11, 21))]:
        x = torch.randn(batch, length, 2)
        torch.testing.assert_close(compiled(x), model(x))
    assert compiled.stats().captures > 2
    assert "where" in str(compiled.plan)


def test_what_the_compiler_assumes_of_them_is_kept() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, 2).sum(-1) * 2  # the length is even

    compiled = compile(model, CONFIG, dynamic_dims=NAMED, max_dims=MOST)
    for batch, length in ((3, 8), (1, 2), (6, 20), (2, 40)):
        x = torch.randn(batch, length)
        torch.testing.assert_close(compiled(x), model(x))
    for batch, length in ((3, 7), (1, 1)):
        with pytest.raises(errors.SplitpointError):
            compiled(torch.randn(batch, length))
    x = torch.randn(3, 10)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dims", [NAMED, {"x": 0}])
def test_a_length_that_the_compiler_fixed_to_its_hint_is_kept(dims: Any) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        x[len(x) - 1] = 3  # whether that is the whole of x, Inductor decides by the hint
        return x + 1

    config = Config(max_size=36, split_points=[8], hint="start", cache_dir="")
    compiled = compile(model, config, dynamic_dims=dims)
    for batch, length in ((1, 8), (2, 8), (3, 8), (1, 8), (4, 8)):
        x = torch.randn(batch, length, 4)
        y = x.clone()
        torch.testing.assert_close(compiled(x), model(y))
        assert torch.equal(x, y)


@pytest.mark.parametrize("dims", [NAMED, {"x": {0: "batch"}}])
def test_what_the_store_has_no_code_for_is_captured_and_compiled(tmp_path: Path, dims: Any) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 5:
            return x * 3
        x = x.clone()
        x[len(x) - 1] = 3
        return x + 1

    config = Config(max_size=64, split_points=[8], cache_dir=str(tmp_path), hint="start")
    for shapes in (((1, 8), (3, 8)), ((1, 8), (3, 8), (2, 8), (5, 8), (5, 2), (7, 8), (1, 8))):
        compiled = compile(model, config, dynamic_dims=dims)
        for batch, length in shapes:
            x = torch.randn(batch, 8 if len(dims["x"]) == 1 else length)
            torch.testing.assert_close(compiled(x), model(x))
    assert compiled.stats().loads > 0
    assert compiled.stats().eager_calls == 0


def test_a_size_that_is_not_the_product() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x.sum(1)[:, None] * y, x.shape[1]

    dims: Any = {"x": {0: "batch", 1: "length"}, "y": {0: "batch"}}
    config = Config(max_size=40, split_points=[8], cache_dir="")
    compiled = compile(model, config, dynamic_dims=dims, max_dims={"batch": 6}, size="length")
    for batch, length in SHAPES:
        x, y = torch.randn(batch, length), torch.randn(batch, 3)
        made, wanted = compiled(x, y), model(x, y)
        torch.testing.assert_close(made[0], wanted[0])
        assert made[1] == wanted[1]
    entries = {str(entry.range): entry.lengths for entry in compiled.plan.entries}
    assert [each[:3] for each in entries["[9,40]"]] == [("batch", 1, 6), ("length", 9, 40)]


def test_dims_of_torch_export_and_integer_arguments() -> None:
    def model(x: torch.Tensor, length: int, y: torch.Tensor) -> torch.Tensor:
        return (x[:, :length] + y.sum()) * length

    batch, length = torch.export.Dim("batch", max=6), torch.export.Dim("length", max=40)
    dims: Any = {"x": {0: batch, 1: length}, "length": "length", "y": {0: batch}}
    compiled = compile(model, PLAIN, dynamic_dims=dims)
    for shape in SHAPES:
        x, y = torch.randn(shape), torch.randn(shape[0])
        torch.testing.assert_close(compiled(x, shape[1], y), model(x, shape[1], y))
    with pytest.raises(errors.SizeOutOfPlan, match="batch 7 is above the 6 of max_dims"):
        compiled(torch.randn(7, 2), 2, torch.randn(7))
    with pytest.raises(errors.SizeMismatch, match="they share the length"):
        compiled(torch.randn(3, 2), 3, torch.randn(3))


@pytest.mark.parametrize("mode", MODES)
def test_views_updates_in_place_and_strides(mode: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(6, 40, 4))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            assert isinstance(self.seen, torch.Tensor)
            batch, length = x.shape[:2]
            self.seen[:batch, :length] += x
            y.mul_(2)
            return x.transpose(0, 1), self.seen[:batch, :length], y, (x + y).transpose(1, 2)[0]

    eager, ours = Model(), Model()
    dims: Any = {name: {0: "batch", 1: "length"} for name in "xy"}
    compiled = compile(ours, CONFIG, dynamic_dims=dims, max_dims=MOST)
    with mode():
        for batch, length in SHAPES:
            x = torch.randn(length, batch, 4).transpose(0, 1)
            y = torch.randn(batch, length, 4)
            z = y.clone()
            made, wanted = compiled(x, z), eager(x, y)
            torch.testing.assert_close(made, wanted)
            for one, other in zip(made[:3], wanted[:3], strict=True):
                strides = zip(one.shape, one.stride(), other.stride(), strict=True)
                assert all(n == 1 or a == b for n, a, b in strides)
            assert made[2] is z
            assert made[0].data_ptr() == x.data_ptr()
            assert made[1].data_ptr() == ours.seen.data_ptr()  # type: ignore[operator]
            torch.testing.assert_close(ours.seen, eager.seen)


def test_whole_shapes_have_static_graphs() -> None:
    config = Config(max_size=128, split_points=[16], compile_sizes=[(2, 8), (1, 40)], cache_dir="")
    model = encoder()
    compiled = compile(model, config, dynamic_dims={**NAMED}, max_dims=MOST)
    for shape in SHAPES:
        x, _ = encoder_call(*shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    exact = [e for e in compiled.plan.entries if all(a == b for _, a, b, _ in e.lengths)]
    assert [entry.lengths for entry in exact] == [
        (("batch", 2, 2, 2), ("length", 8, 8, 8)),
        (("batch", 1, 1, 1), ("length", 40, 40, 40)),
    ]
    assert compiled.stats().dispatches[exact[0].range] >= 1


def test_dimensions_that_calls_show_to_change(caplog: pytest.LogCaptureFixture) -> None:
    model = encoder()
    compiled = compile(model, CONFIG)
    with caplog.at_level(logging.WARNING, "splitpoint"):
        for shape in SHAPES:
            x, mask = encoder_call(*shape)
            torch.testing.assert_close(compiled(x, mask), model(x, mask), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    said = [record.message for record in caplog.records if "dynamic_dims=" in record.message]
    assert 1 <= len(said) <= 2
    assert "'mask': {0: 'dim0_of_x', 1: 'dim1_of_x'}" in said[0]
    assert compiled.stats().eager_calls == 0


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({}, {"dynamic_dims": {"x": {0: "size", 1: "length"}}}, "each must be named"),
        ({}, {"dynamic_dims": {"x": {0: "a b"}}}, "give a name such as 'batch'"),
        ({}, {"dynamic_dims": {"x": {0: 3}}}, "give a name such as 'batch'"),
        ({}, {"dynamic_dims": NAMED, "max_dims": {"heads": 3}}, "max_dims names heads"),
        ({}, {"dynamic_dims": NAMED, "size": "batch - length"}, "sum or product"),
        ({"background": True}, {"dynamic_dims": NAMED}, "background=True is for one"),
        ({"compile_sizes": [4]}, {"dynamic_dims": NAMED}, "the length of each of batch, length"),
        ({"compile_sizes": [(4,)]}, {"dynamic_dims": NAMED}, "2 dimensions change"),
        ({"compile_sizes": [(4, 2)]}, {"dynamic_dims": {"x": 0}}, "one dimension changes"),
    ],
)
def test_what_does_not_go_together_is_refused(
    config: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    compiled = compile(lambda x: x + 1, Config(max_size=64, cache_dir="", **config), **options)
    with pytest.raises(errors.InvalidDynamicDims, match=said) as caught:
        compiled(torch.randn(3, 5))
    assert len(str(caught.value).splitlines()) <= 3


def test_size_zero_and_sizes_out_of_plan() -> None:
    config = Config(max_size=16, on_out_of_plan="eager", cache_dir="", backend="eager")
    compiled = compile(lambda x: x.sum(0), config, dynamic_dims=NAMED)
    for shape in ((3, 5), (0, 5), (3, 0), (4, 5), (17, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), x.sum(0))
    assert compiled.stats().eager_calls == 4
