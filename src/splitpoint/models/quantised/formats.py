"""The formats of quantised checkpoints: what their configurations say, and what their tensors
hold.

Each entry of `FORMATS` is one `quant_method` of a `quantization_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModel
from .decoded import BITS, Decoded, even_groups, signed, unpacked

Settings = Mapping[str, Any]
"""A `quantization_config`."""


@dataclass(frozen=True)
class Format:
    """One way to store quantised weights."""

    mark: str
    """The tensor that says of a layer that it is quantised."""
    tensors: frozenset[str]
    """All that a quantised layer may have, beside a bias."""
    refusals: Callable[[Settings], Iterator[str]]
    """What a configuration asks for that is not taken, by name."""
    decode: Callable[[Mapping[str, Tensor], Settings, int, int], Decoded]
    """From a layer's tensors, scales in float32, to its weight of [n, k]. Raises UnsupportedModel
    for what is not taken."""


def _need(given: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in given]
    if missing:
        raise UnsupportedModel(f"no tensor {', '.join(missing)}: the checkpoint is not whole")
    return [given[name] for name in names]


def _bits_of(rows: int, words: int) -> int:
    """How many bits each of so many values has, that so many words of 32 bits hold."""
    for bits in BITS:
        if -(-rows * bits // 32) == words:
            return bits
    raise UnsupportedModel(
        f"{words} words of 32 bits for {rows} columns: values need 4 or 8 bits, not "
        f"{words * 32 / max(rows, 1):.3g}"
    )


def _shape(given: Tensor, name: str, *expected: int) -> None:
    if given.shape != expected:
        raise UnsupportedModel(
            f"{name} is {list(given.shape)}, not {list(expected)}: the checkpoint contradicts its "
            f"configuration"
        )


def _version(settings: Settings, default: str) -> str:
    """The version of a format, under the names that programs have for it."""
    found = (settings.get(name) for name in ("version", "checkpoint_format", "format"))
    return next((str(each).lower() for each in found if each), default)


# --- GPTQ ------------------------------------------------------------------------------

_GPTQ_VERSIONS = ("gptq", "gptq_v2")


def _gptq_refusals(settings: Settings) -> Iterator[str]:
    if (version := _version(settings, "gptq")) not in _GPTQ_VERSIONS:
        yield f"checkpoint_format={version!r} (taken: {', '.join(map(repr, _GPTQ_VERSIONS))})"
    if settings.get("is_marlin_format"):
        yield "is_marlin_format=True"
    if settings.get("pack_dtype", "int32") not in ("int32", None):
        yield f"pack_dtype={settings['pack_dtype']!r} (taken: 'int32')"


def _gptq(given: Mapping[str, Tensor], settings: Settings, n: int, k: int) -> Decoded:
    """qweight is [k / (32 / bits), n], packed along k; qzeros [groups, n / (32 / bits)], packed
    along n, and one less than the zero points in version 1; scales [groups, n]; g_idx [k], the
    group of each k, in any order with `desc_act`."""
    words, stored, scales = _need(given, "qweight", "qzeros", "scales")
    bits = _bits_of(k, words.shape[0])
    groups = scales.shape[0]
    _shape(words, "qweight", k * bits // 32, n)
    _shape(stored, "qzeros", groups, n * bits // 32)
    zeros = unpacked(stored, bits)
    if _version(settings, "gptq") == "gptq":
        if bool((zeros == 2**bits - 1).any()):
            raise UnsupportedModel(
                f"zero points stored as {2**bits - 1}, which in version 1 of the format are 0 or "
                f"{2**bits}: quantise to 'gptq_v2', or symmetrically"
            )
        zeros += 1
    if "g_idx" in given:
        group_of = given["g_idx"].long()
        if bool((group_of < 0).any() or (group_of >= groups).any()):
            raise UnsupportedModel(f"g_idx names groups that are not among {groups}")
    else:
        group_of = even_groups(k, settings.get("group_size", -1), groups)
    return Decoded(
        bits,
        signed(unpacked(words.t(), bits), bits),
        scales.t(),
        signed(zeros, bits).t(),
        group_of,
    )


# --- AWQ -------------------------------------------------------------------------------

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns the bits of a word hold, from the lowest four on."""


def _awq_refusals(settings: Settings) -> Iterator[str]:
    if (version := _version(settings, "gemm")) != "gemm":
        yield f"version={version!r} (taken: 'gemm')"
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        yield f"bits={bits} (taken: 4)"


def _awq(given: Mapping[str, Tensor], settings: Settings, n: int, k: int) -> Decoded:
    """qweight is [k, n / 8] and qzeros [groups, n / 8], packed along n in `_AWQ_ORDER`; scales
    [groups, n]."""
    words, stored, scales = _need(given, "qweight", "qzeros", "scales")
    groups = scales.shape[0]
    _shape(words, "qweight", k, n // 8)
    _shape(stored, "qzeros", groups, n // 8)
    back = torch.tensor(_AWQ_ORDER).argsort()

    def columns(each: Tensor) -> Tensor:
        """[n, ...] of [..., n / 8] words."""
        inside = unpacked(each, 4).view(*each.shape, 8)[..., back]
        return signed(inside.flatten(-2), 4).t().contiguous()

    group_of = even_groups(k, settings.get("group_size", settings.get("q_group_size", 128)), groups)
    return Decoded(4, columns(words), scales.t(), columns(stored), group_of)


# --- compressed-tensors ----------------------------------------------------------------

_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_STRATEGIES = ("group", "channel", "tensor")


def _compressed_refusals(settings: Settings) -> Iterator[str]:
    for name in ("kv_cache_scheme", "transform_config"):
        if settings.get(name):
            yield f"a {name}"
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        yield f"sparsity_config.format={sparsity['format']!r}"
    for group in settings.get("config_groups", {}).values():
        made = group.get("format") or settings.get("format")
        if made not in _COMPRESSED_FORMATS:
            yield f"format={made!r} (taken: {', '.join(map(repr, _COMPRESSED_FORMATS))})"
        for name in ("input_activations", "output_activations"):
            if group.get(name):
                yield f"{name} (taken: weights alone)"
        weights = group.get("weights") or {}
        if weights.get("type", "int") != "int":
            yield f"weights of type {weights['type']!r} (taken: 'int')"
        if weights.get("num_bits") not in BITS:
            yield f"num_bits={weights.get('num_bits')} (taken: 4, 8)"
        if (strategy := weights.get("strategy")) not in _STRATEGIES:
            yield f"strategy={strategy!r} (taken: {', '.join(map(repr, _STRATEGIES))})"


def _compressed(given: Mapping[str, Tensor], settings: Settings, n: int, k: int) -> Decoded:
    """weight_packed is [n, k / (32 / bits)], packed along k, or weight int8 [n, k];
    weight_scale [n, groups]; weight_zero_point [n, groups] in int8, or in words packed along n;
    weight_g_idx [k], the group of each k. Packed values and zero points are moved to 0 and above.
    """
    (scales,) = _need(given, "weight_scale")
    scales = scales.reshape(-1, scales.shape[-1] if scales.dim() == 2 else 1).expand(n, -1)
    groups = scales.shape[1]
    if "weight_packed" in given:
        words = given["weight_packed"]
        bits = _bits_of(k, words.shape[1])
        _shape(words, "weight_packed", n, -(-k * bits // 32))
        values = signed(unpacked(words, bits)[:, :k], bits)
    else:
        (values,) = _need(given, "weight")
        _shape(values, "weight", n, k)
        if values.dtype != torch.int8:
            raise UnsupportedModel(f"weights in {values.dtype}: they need to be int8 or packed")
        bits = max(weights["num_bits"] for weights in _weights(settings))
    zeros = given.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = signed(unpacked(zeros.t(), bits)[:, :n], bits).t()
    if zeros is not None:
        if not torch.equal(zeros, zeros.to(torch.int8).to(zeros.dtype)):
            raise UnsupportedModel("zero points that are no whole steps")
        zeros = zeros.to(torch.int8)
        zeros = zeros.reshape(-1, zeros.shape[-1] if zeros.dim() == 2 else 1).expand_as(scales)
    if "weight_g_idx" in given:
        group_of = given["weight_g_idx"].long()
    else:
        sizes = [each.get("group_size") or -1 for each in _weights(settings)]
        fitting = (size for size in sizes if -(-k // (k if size == -1 else size)) == groups)
        group_of = even_groups(k, next(fitting, sizes[0]), groups)
    return Decoded(bits, values, scales, zeros, group_of)


def _weights(settings: Settings) -> list[Settings]:
    """How weights are quantised, by group of layers."""
    return [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]


FORMATS: dict[str, Format] = {
    "gptq": Format(
        "qweight", frozenset({"qweight", "qzeros", "scales", "g_idx"}), _gptq_refusals, _gptq
    ),
    "awq": Format("qweight", frozenset({"qweight", "qzeros", "scales"}), _awq_refusals, _awq),
    "compressed-tensors": Format(
        "weight_scale",
        frozenset(
            {
                *("weight", "weight_packed", "weight_scale", "weight_zero_point"),
                *("weight_shape", "weight_g_idx"),
            }
        ),
        _compressed_refusals,
        _compressed,
    ),
}
"""By `quant_method`."""
