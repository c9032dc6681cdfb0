"""A linear layer whose weight is rounded to int8 or int4, called as vLLM calls its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.bounds import ROUNDOFF, exceeded
from ...kernels.int4 import dequantize_int4, int4_group, pack_int4, quantize_int4
from ...kernels.layout import quads, quantize
from ...kernels.memory import Streamed
from .choice import OURS, THEIRS, Choice
from .measuring import CpuLinear
from .shapes import Shape


class Rounded:
    """A rounded weight in the layouts that its products read; nothing else of it is kept.

    Args:
        weight: [columns, k].
        shape: what it is rounded to, and what else its products may round.
        memory: where it goes.
        choice: which products are asked for; both with None.
    """

    def __init__(
        self, weight: Tensor, shape: Shape, memory: Streamed, choice: Choice | None = None
    ) -> None:
        columns, self.k = weight.shape
        self.columns = [columns]
        self.rounds_x = shape.activations is not None
        self.scales: list[Tensor] = []
        self.weights: list[Tensor] = []
        """For x as it is; empty where it is not asked for, and the other way reads another."""
        with torch.inference_mode(False), torch.no_grad():
            whole = weight.detach().contiguous()
            if shape.weights == "int8":
                values, scale = quantize(whole)
                self.scales = [scale]
                if choice != THEIRS or not self.rounds_x:
                    self.weights = [memory.placed(torch.ops.splitpoint.pack_weight(values))]
                self.beyond = self.weights
                """For the other way."""
                if choice != OURS and self.rounds_x:
                    self.beyond = [memory.placed(quads(values))]
            else:
                packed = pack_int4(*quantize_int4(whole, _group(self.k)))
                self.weights = self.beyond = [memory.placed(packed)]

    def copy(self, memory: Streamed) -> Rounded:
        """The same in memory of its own."""
        made = copy.copy(self)
        made.weights = [memory.placed(self.weights[0])]
        is_one = self.beyond is self.weights
        made.beyond = made.weights if is_one else [memory.placed(self.beyond[0])]
        return made

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x [..., k] times the rounded weight; the one that is given may have been freed."""
        return _packed(x, self.weights[0], self.scale, self.columns[0], bias)

    def other(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As a call, the other way (`Shape.other`): by torch's own product over the weight in x's
        dtype, made for the moment, or with x rounded to int8, a scale a row."""
        run = _rounding if self.rounds_x else _unpacked
        return run(x, self.beyond[0], self.scale, self.columns[0], bias)

    @property
    def scale(self) -> Tensor | None:
        """Of int8, a column."""
        return self.scales[0] if self.scales else None


@dataclass(frozen=True)
class RoundedByRows:
    """`Rounded` for x of up to `most` rows, its other way for more."""

    rounded: Rounded
    most: int

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As `Rounded`. One operator, since rows are not known while a graph is traced."""
        own = self.rounded
        few = own.weights or own.beyond  # read for no number of rows where there is none
        made: Tensor = torch.ops.splitpoint_vllm.linear_rounded(
            x, few[0], own.beyond[0], own.scale, own.columns[0], bias, self.most, own.rounds_x
        )
        return made


def by_rows(weight: Tensor, shape: Shape, choice: Choice, memory: Streamed) -> CpuLinear:
    """What a layer calls, of its [n, k] weight."""
    rounded = Rounded(weight, shape, memory, choice)
    return rounded if choice.most is None else RoundedByRows(rounded, choice.most)


class Reference:
    """What some columns of a rounded weight's product are to be."""

    def __init__(self, weight: Tensor, shape: Shape, columns: list[int]) -> None:
        """Of a [n, k] weight."""
        self._columns = columns
        self._scales: list[Tensor] = []
        self._rounds_x = shape.activations is not None
        self._is_int8 = shape.weights == "int8"
        part = weight.detach()[columns]
        if self._is_int8:
            self._values, scale = quantize(part)
            self._scales = [scale]
        else:
            self._values = dequantize_int4(*quantize_int4(part, _group(part.shape[1])))

    def agrees(self, y: Tensor, x: Tensor, is_other: bool) -> bool:
        """Whether y [rows, n] is x [rows, k] times the weight, this way or the other, for sums in
        fp32 in any order, and values that were rounded to x's dtype where that is so."""
        rounds_x = is_other and self._rounds_x
        rounds_values = not rounds_x and (is_other or not self._is_int8)
        return (
            exceeded(
                [y[:, self._columns]],
                x,
                [self._values],
                scales=self._scales,
                off=[ROUNDOFF[x.dtype] * self._values.float().abs()] if rounds_values else [],
                rounds_x=rounds_x,
                exact_sums=rounds_x and self._is_int8,
            )
            <= 1
        )


def _group(k: int) -> int:
    group = int4_group(k)
    assert group is not None, "kind_for was not asked"
    return group


# --- the ways as one operator ----------------------------------------------------------


def _packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    n: int,
    bias: Tensor | None,
    round_x: bool = False,
) -> Tensor:
    scales = [] if scale is None else [scale]
    biases = [] if bias is None else [bias.to(x.dtype)]
    made: Tensor = torch.ops.splitpoint.linear_packed(
        x, [packed], [n], scales, biases, round_x=round_x
    )[0]
    return made


def _rounding(
    x: Tensor, packed: Tensor, scale: Tensor | None, n: int, bias: Tensor | None
) -> Tensor:
    # Over int8, which alone has a scale, the layout says so.
    return _packed(x, packed, scale, n, bias, round_x=scale is None)


def _unpacked(
    x: Tensor, packed: Tensor, scale: Tensor | None, n: int, bias: Tensor | None
) -> Tensor:
    turned = torch.ops.splitpoint.unpack_weight(packed, scale, n, x.shape[-1], x.dtype)
    return F.linear(x, turned.t(), None if bias is None else bias.to(x.dtype))


def _linear(
    x: Tensor,
    few: Tensor,
    many: Tensor,
    scale: Tensor | None,
    columns: int,
    bias: Tensor | None,
    most: int,
    rounds_x: bool,
) -> Tensor:
    if x.numel() <= most * x.shape[-1]:
        return _packed(x, few, scale, columns, bias)
    return (_rounding if rounds_x else _unpacked)(x, many, scale, columns, bias)


def _linear_without_data(
    x: Tensor,
    few: Tensor,
    many: Tensor,
    scale: Tensor | None,
    columns: int,
    bias: Tensor | None,
    most: int,
    rounds_x: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_library = torch.library.Library("splitpoint_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear_rounded(Tensor x, Tensor few, Tensor many, Tensor? scale, int columns, Tensor? bias, "
    "int most, bool rounds_x) -> Tensor"
)
_library.impl("linear_rounded", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("splitpoint_vllm::linear_rounded", _linear_without_data, lib=_library)
