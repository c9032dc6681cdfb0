"""Quantised weights as their formats store them are decoded exactly, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from splitpoint.errors import UnsupportedModel
from splitpoint.kernels.memory import Streamed
from splitpoint.models.quantised.decoded import packed_linear
from splitpoint.models.quantised.formats import FORMATS
from tests.models.quantised import stored
from tests.models.quantised.stored import Drawn, draw

thorough = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def layer(method: str, tensors: Mapping[str, Tensor], settings: Any, n: int, k: int) -> Any:
    """What a layer of these tensors becomes, as it is read: its floats in float32."""
    read = {
        name: each.float() if each.is_floating_point() else each for name, each in tensors.items()
    }
    return packed_linear(FORMATS[method].decode(read, settings, n, k), None, Streamed())


def check(made: Any, drawn: Drawn) -> None:
    """The layer stands for the weight exactly, and computes with it."""
    weight = drawn.weight
    assert torch.equal(made.weight(torch.float32).double(), weight)
    x = torch.randn(3, weight.shape[1])
    expected = x.double() @ weight.t()
    size = x.double().abs() @ weight.abs().t() + 16 * drawn.s.double().abs().amax()
    assert bool(((made(x).double() - expected).abs() <= 1e-5 * size).all())


@thorough
@given(
    n=st.integers(1, 9).map(lambda count: 8 * count),
    count=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128, 256, -1]),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_gptq(
    n: int,
    count: int,
    group: int,
    version: str,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    k = 64 * count if group == -1 else group * count
    drawn = draw(n, k, group, symmetric=symmetric, act_order=act_order, dtype=dtype, seed=seed)
    settings = {"checkpoint_format": version, "group_size": group, "desc_act": act_order}
    made = layer("gptq", stored.gptq(drawn, version), settings, n, k)
    check(made, drawn)
    if not act_order:
        assert made.order is None
        without = stored.gptq(drawn, version, with_order=False)
        check(layer("gptq", without, settings, n, k), drawn)


def test_gptq_has_no_zero_points_and_narrow_scales_where_it_can() -> None:
    sizes = {}
    for symmetric in (True, False):
        for dtype in (torch.bfloat16, torch.float16):
            drawn = draw(32, 128, 128, symmetric=symmetric, dtype=dtype)
            made = layer("gptq", stored.gptq(drawn), {}, 32, 128)
            sizes[symmetric, dtype] = made.packed.nbytes // 32
    assert sizes == {
        (True, torch.bfloat16): 64 + 2,
        (True, torch.float16): 64 + 4,
        (False, torch.bfloat16): 64 + 3,
        (False, torch.float16): 64 + 5,
    }


@thorough
@given(
    n=st.integers(1, 9).map(lambda count: 8 * count),
    count=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 1000),
)
def test_awq(n: int, count: int, group: int, seed: int) -> None:
    k = 96 * count if group == -1 else group * count
    drawn = draw(n, k, group, seed=seed)
    made = layer("awq", stored.awq(drawn), {"group_size": group, "version": "gemm"}, n, k)
    check(made, drawn)


@thorough
@given(
    n=st.integers(1, 70),
    count=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128, -1]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_compressed_tensors(
    n: int,
    count: int,
    group: int,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    k = 32 * count if group == -1 else group * count
    drawn = draw(n, k, group, symmetric=symmetric, act_order=act_order, dtype=dtype, seed=seed)
    if dtype == torch.float32:  # exact products of 24 bits and 5 need more than float32 has
        drawn = Drawn(drawn.bits, drawn.q, drawn.z, drawn.s.half().float(), drawn.group_of)
    settings = stored.compressed_settings(4, group, symmetric)
    tensors = stored.compressed(drawn, symmetric, with_order=act_order)
    check(layer("compressed-tensors", tensors, settings, n, k), drawn)


@thorough
@given(n=st.integers(1, 70), k=st.integers(5, 100), seed=st.integers(0, 1000))
def test_int8_with_one_scale_a_row(n: int, k: int, seed: int) -> None:
    drawn = draw(n, k, -1, bits=8, symmetric=True, seed=seed, size=0.003)
    settings = stored.compressed_settings(8, -1, True)
    for tensors in (stored.compressed(drawn, True), stored.plain_int8(drawn)):
        check(layer("compressed-tensors", tensors, settings, n, k), drawn)
    whole = draw(8 * n, 4 * k, -1, bits=8, symmetric=True, seed=seed, size=0.003)
    check(layer("gptq", stored.gptq(whole), {"bits": 8}, 8 * n, 4 * k), whole)


def test_partial_groups_at_the_end() -> None:
    drawn = draw(16, 160, 128)
    settings = {"checkpoint_format": "gptq", "group_size": 128}
    for with_order in (True, False):
        made = layer("gptq", stored.gptq(drawn, with_order=with_order), settings, 16, 160)
        check(made, drawn)
    settings = stored.compressed_settings(4, 128, False)
    made = layer("compressed-tensors", stored.compressed(drawn, False), settings, 16, 160)
    check(made, drawn)


def test_biases_of_zeros_are_none() -> None:
    drawn = draw(16, 64, 64)
    weight = FORMATS["gptq"].decode(stored.gptq(drawn), {}, 16, 64)
    assert packed_linear(weight, torch.zeros(16), Streamed()).bias is None
    bias = torch.randn(16)
    made = packed_linear(weight, bias, Streamed())
    x = torch.randn(2, 64)
    torch.testing.assert_close(made(x), packed_linear(weight, None, Streamed())(x) + bias)


def broken(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = stored.gptq(draw(16, 64, 32))
    change(tensors)
    return tensors


def set_first_zero_point_to_15(tensors: dict[str, Tensor]) -> None:
    tensors["qzeros"][0, 0] |= 15


@pytest.mark.parametrize(
    ("method", "tensors", "settings", "says"),
    [
        ("gptq", broken(set_first_zero_point_to_15), {}, "zero points stored as 15"),
        ("gptq", broken(lambda t: t.pop("scales")), {}, "no tensor scales"),
        ("gptq", broken(lambda t: t["g_idx"].add_(1)), {}, "g_idx names groups"),
        ("gptq", broken(lambda t: t.pop("g_idx")), {"group_size": 64}, "2 scales a row for 64"),
        ("gptq", broken(lambda t: t.update(qzeros=t["qzeros"][:1])), {}, "qzeros is"),
        ("gptq", broken(lambda t: t.update(qweight=t["qweight"][:6])), {}, "4 or 8 bits, not 3"),
        ("gptq", stored.gptq(draw(16, 64, 16)), {}, "64 columns in groups of 16"),
        ("gptq", stored.gptq(draw(16, 40, -1)), {}, "40 columns in groups of 40"),
        (
            "gptq",
            stored.gptq(draw(16, 64, 32, bits=8, symmetric=True)),
            {},
            "8 bits with 2 scales a row",
        ),
        ("gptq", stored.gptq(draw(16, 64, -1, bits=8)), {}, "8 bits with zero points"),
        ("awq", stored.awq(draw(16, 64, 32)), {"group_size": 64}, "2 scales a row for 64"),
        (
            "compressed-tensors",
            {"weight": torch.zeros(16, 64), "weight_scale": torch.ones(16, 1)},
            stored.compressed_settings(8, -1, True),
            "weights in torch.float32",
        ),
        (
            "compressed-tensors",
            stored.compressed(draw(16, 64, 32), True)
            | {"weight_zero_point": torch.full((16, 2), 0.5)},
            stored.compressed_settings(4, 32, False),
            "no whole steps",
        ),
    ],
)
def test_what_is_not_taken_is_named(
    method: str, tensors: dict[str, Tensor], settings: Any, says: str
) -> None:
    n = 16
    k = 40 if "40 columns" in says else 64
    with pytest.raises(UnsupportedModel, match=says) as caught:
        layer(method, tensors, settings, n, k)
    assert len(str(caught.value).splitlines()) <= 3


W4 = stored.compressed_settings(4, 32, True)


def group(**change: Any) -> dict[str, Any]:
    return W4 | {"config_groups": {"group_0": W4["config_groups"]["group_0"] | change}}


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype='int16'"),
        ("awq", {"version": "gemv"}, "version='gemv'"),
        ("awq", {"bits": 3}, "bits=3"),
        ("compressed-tensors", W4 | {"kv_cache_scheme": {"num_bits": 8}}, "a kv_cache_scheme"),
        (
            "compressed-tensors",
            W4 | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ("compressed-tensors", group(format="float-quantized"), "format='float-quantized'"),
        ("compressed-tensors", group(input_activations={"num_bits": 8}), "input_activations"),
        ("compressed-tensors", group(weights={"num_bits": 8, "type": "float"}), "type 'float'"),
        ("compressed-tensors", group(weights={"num_bits": 2}), "num_bits=2"),
        (
            "compressed-tensors",
            group(weights={"num_bits": 4, "strategy": "block"}),
            "strategy='block'",
        ),
    ],
)
def test_settings_that_are_not_taken_are_named(method: str, settings: Any, says: str) -> None:
    assert any(says in each for each in FORMATS[method].refusals(settings))


def test_settings_that_are_taken() -> None:
    for method, settings in (
        ("gptq", {"bits": 4, "group_size": 128, "sym": True, "desc_act": True}),
        ("gptq", {"checkpoint_format": "gptq_v2", "pack_dtype": "int32"}),
        ("awq", {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}),
        ("compressed-tensors", W4),
        ("compressed-tensors", stored.compressed_settings(8, -1, True, "int-quantized")),
    ):
        assert not list(FORMATS[method].refusals(settings))


# --- others' programs ------------------------------------------------------------------


def test_compressed_tensors_package_decodes_the_same() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for size, symmetric in ((32, True), (128, False), (-1, True), (-1, False)):
        weights = stored.compressed_settings(4, size, symmetric)["config_groups"]["group_0"]
        args = QuantizationArgs(**weights["weights"])
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        drawn = draw(24, 256, size, symmetric=symmetric, dtype=torch.float32)
        zeros = torch.from_numpy(drawn.z - 8).to(torch.int8)
        weight = {"weight": drawn.weight.float(), "weight_scale": drawn.s}
        given = PackedQuantizationCompressor.compress(weight | {"weight_zero_point": zeros}, scheme)
        settings = stored.compressed_settings(4, size, symmetric)
        made = layer("compressed-tensors", given, settings, 24, 256)
        theirs = PackedQuantizationCompressor.decompress(given, scheme)["weight"]
        torch.testing.assert_close(made.weight(torch.float32), theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(theirs.double(), drawn.weight, rtol=1e-6, atol=0)


def test_compressed_tensors_package_reads_awq_the_same() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    drawn = draw(24, 256, 64)
    tensors = {f"layer.{name}": each for name, each in stored.awq(drawn).items()}
    theirs = AutoAWQConverter(group_size=64, ignore=()).process(tensors)
    values = unpack_from_int32(theirs["layer.weight_packed"], 4, torch.Size([24, 256]))
    zeros = unpack_from_int32(
        theirs["layer.weight_zero_point"], 4, torch.Size([24, 4]), packed_dim=0
    )
    off = values.double() - zeros.double().repeat_interleave(64, 1)
    weight = off * theirs["layer.weight_scale"].double().repeat_interleave(64, 1)
    assert torch.equal(weight, drawn.weight)
