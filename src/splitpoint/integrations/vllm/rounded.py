"""A linear layer whose weight is rounded to int8 or int4, called as vLLM calls its own."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import Weights
from ...kernels.bounds import ROUNDOFF, exceeded
from ...kernels.int4 import dequantize_int4, int4_group, pack_int4, quantize_int4
from ...kernels.layout import quantize
from ...kernels.memory import Streamed
from .choice import Choice


class Rounded:
    """A rounded weight in this package's layout, and its product; nothing else of it is kept."""

    def __init__(self, weight: Tensor, kind: Weights, memory: Streamed) -> None:
        columns, self.k = weight.shape
        self.columns = [columns]
        self.scales: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            whole = weight.detach().contiguous()
            if kind == "int8":
                values, scale = quantize(whole)
                packed = torch.ops.splitpoint.pack_weight(values)
                self.scales = [scale]
            else:
                packed = pack_int4(*quantize_int4(whole, _group(self.k)))
        self.weights = [memory.placed(packed)]

    def copy(self, memory: Streamed) -> Rounded:
        """The same in memory of its own."""
        made = copy.copy(self)
        made.weights = [memory.placed(self.weights[0])]
        return made

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x [..., k] times the rounded weight; the one that is given may have been freed."""
        scale = self.scales[0] if self.scales else None
        return _packed(x, self.weights[0], scale, self.columns[0], bias)

    def unpacked(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As a call, by torch's own product over the weight in x's dtype, made for the moment."""
        scale = self.scales[0] if self.scales else None
        return _unpacked(x, self.weights[0], scale, self.columns[0], bias)


class RoundedByRows:
    """`Rounded` for x of up to `most` rows, its `unpacked` for more."""

    def __init__(self, rounded: Rounded, most: int) -> None:
        self.rounded, self.most = rounded, most

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As `Rounded`. One operator, since rows are not known while a graph is traced."""
        own = self.rounded
        scale = own.scales[0] if own.scales else None
        made: Tensor = torch.ops.splitpoint_vllm.linear_rounded(
            x, own.weights[0], scale, own.columns[0], bias, self.most
        )
        return made


def by_rows(rounded: Rounded, choice: Choice) -> Rounded | RoundedByRows:
    """What a layer calls."""
    return rounded if choice.most is None else RoundedByRows(rounded, choice.most)


class Reference:
    """What some columns of a rounded weight's product are to be."""

    def __init__(self, weight: Tensor, kind: Weights, columns: list[int]) -> None:
        """Of a [n, k] weight."""
        self._columns = columns
        self._scales: list[Tensor] = []
        self._is_int8 = kind == "int8"
        part = weight.detach()[columns]
        if self._is_int8:
            self._values, scale = quantize(part)
            self._scales = [scale]
        else:
            self._values = dequantize_int4(*quantize_int4(part, _group(part.shape[1])))

    def agrees(self, y: Tensor, x: Tensor, is_unpacked: bool) -> bool:
        """Whether y [rows, n] is x [rows, k] times the weight, for sums in fp32 in any order, and
        values that were rounded to x's dtype where that is so."""
        rounds = is_unpacked or not self._is_int8
        off = [ROUNDOFF[x.dtype] * self._values.float().abs()] if rounds else []
        picked = [y[:, self._columns]]
        return exceeded(picked, x, [self._values], scales=self._scales, off=off) <= 1


def _group(k: int) -> int:
    group = int4_group(k)
    assert group is not None, "kind_for was not asked"
    return group


# --- the two ways as one operator ------------------------------------------------------


def _packed(x: Tensor, packed: Tensor, scale: Tensor | None, n: int, bias: Tensor | None) -> Tensor:
    scales = [] if scale is None else [scale]
    biases = [] if bias is None else [bias.to(x.dtype)]
    made: Tensor = torch.ops.splitpoint.linear_packed(x, [packed], [n], scales, biases)[0]
    return made


def _unpacked(
    x: Tensor, packed: Tensor, scale: Tensor | None, n: int, bias: Tensor | None
) -> Tensor:
    turned = torch.ops.splitpoint.unpack_weight(packed, scale, n, x.shape[-1], x.dtype)
    return F.linear(x, turned.t(), None if bias is None else bias.to(x.dtype))


def _linear(
    x: Tensor, packed: Tensor, scale: Tensor | None, columns: int, bias: Tensor | None, most: int
) -> Tensor:
    run = _packed if x.numel() <= most * x.shape[-1] else _unpacked
    return run(x, packed, scale, columns, bias)


def _linear_without_data(
    x: Tensor, packed: Tensor, scale: Tensor | None, columns: int, bias: Tensor | None, most: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_library = torch.library.Library("splitpoint_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear_rounded(Tensor x, Tensor packed, Tensor? scale, int columns, Tensor? bias, int most) "
    "-> Tensor"
)
_library.impl("linear_rounded", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("splitpoint_vllm::linear_rounded", _linear_without_data, lib=_library)
