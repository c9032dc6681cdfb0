"""Give the attention between a graph's pieces the kernel that fits a range.

torch's own operator divides long inputs into blocks and calls a GEMM for each: where there are few
tokens most of its time goes to these calls, and where there are many to what lies between them.
Which is faster where is measured (`tuning.attention`); what is replaced is a step between pieces,
so that no piece changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..graph.pieces import CallOp, Name, Size, Split, TensorKind
from ..kernels.devices import device_row
from ..ranges import Range
from ..torch_internals.operators import op_name, operator_aliases

LARGEST_HEAD = 256


@dataclass(frozen=True)
class AttentionShape:
    """What the choice of a kernel depends on: softmax(query @ key^T * scale + mask) @ value."""

    query: TensorKind
    """[batch, heads, queries, size]."""
    key: TensorKind
    """[batch, kv_heads, keys, size]."""
    value: TensorKind
    """[batch, kv_heads, keys, value_size]."""
    mask: TensorKind | None
    """Broadcasts to [batch, heads, queries, keys]; what a boolean one has true is kept."""
    causal: bool
    scale: float | None
    rows_outside: bool
    """Whether the result lies in memory as [batch, queries, heads, value_size]."""

    def __str__(self) -> str:
        heads, size = self.query.shape[1], self.query.shape[3]
        shared = "" if self.key.shape[1] == heads else f" over {self.key.shape[1]}"
        kind = "boolean" if self.mask and self.mask.dtype == torch.bool else "added"
        mask = f", {kind} mask" if self.mask else ""
        rows = f"{_factor(self.query.shape[2])} x {_factor(self.key.shape[2])}"
        return f"{heads} heads{shared} of {size}, {rows}{', causal' * self.causal}{mask}"


def _factor(expression: Any) -> str:
    code = Size(expression).code
    return code if code.isalnum() else f"({code})"


@dataclass(frozen=True)
class AttentionVariant:
    """One way to run attention. Adding one is adding an entry to `VARIANTS`."""

    name: str
    fits: Callable[[AttentionShape], bool]
    """Whether it can run one at all, of those that `shape_of` knows."""
    promises: Callable[[AttentionShape, Range], bool]
    """Whether it is worth measuring in a range."""
    call: Callable[[AttentionShape], tuple[Any, dict[str, Any]]]
    """The operator and its keyword arguments beside query, key, value and mask, which it takes in
    this order."""
    blockwise: bool = False
    """Whether the softmax is made block by block: see `kernels.attention.bounds`."""
    batch_invariant: bool = False
    """Whether a query's result has the same bits beside other queries, and with masked keys behind
    its own."""


def _call(shape: AttentionShape, blockwise: bool) -> tuple[Any, dict[str, Any]]:
    options = {
        "is_causal": shape.causal,
        "scale": shape.scale,
        "enable_gqa": shape.query.shape[1] != shape.key.shape[1],
        "rows_outside": shape.rows_outside,
        "blockwise": blockwise,
    }
    return torch.ops.splitpoint.attention.default, options


DTYPES = (torch.float32, torch.bfloat16)


def _fits_blockwise(shape: AttentionShape) -> bool:
    sizes = (shape.query.shape[3], shape.value.shape[3])
    return shape.query.dtype in DTYPES and all(size % 8 == 0 for size in sizes)


VARIANTS: dict[str, AttentionVariant] = {
    v.name: v
    for v in (
        AttentionVariant(
            "rowwise",
            lambda s: s.query.dtype in DTYPES,
            lambda s, r: s.query.shape_at(r.start)[2] <= (128 if _fits_blockwise(s) else 1024),
            lambda s: _call(s, blockwise=False),
            batch_invariant=True,
        ),
        AttentionVariant(
            "blockwise",
            _fits_blockwise,
            lambda s, r: s.query.shape_at(r.end)[2] > 8,
            lambda s: _call(s, blockwise=True),
            blockwise=True,
        ),
    )
}
"""Kernels of this package, by name. "torch", which is not in it, leaves attention as it is."""


# --- finding ---------------------------------------------------------------------------


def find(split: Split) -> Iterator[tuple[int, AttentionShape]]:
    """The steps (by index) that are attention which a kernel may take over."""
    for index, step in enumerate(split.steps):
        if isinstance(step, CallOp) and (shape := shape_of(step)) is not None:
            yield index, shape


def others(split: Split) -> Iterator[CallOp]:
    """The steps that are attention which no kernel may take over."""
    for step in split.steps:
        if (
            isinstance(step, CallOp)
            and (op_name(step.target) in _names() or "flex_attention" in op_name(step.target))
            and shape_of(step) is None
        ):
            yield step


@cache
def _names() -> frozenset[str]:
    return frozenset(operator_aliases("aten::scaled_dot_product_attention"))


def _arguments(step: CallOp) -> dict[str, Any] | None:
    """Arguments of attention by name; None for what is not attention."""
    if op_name(step.target) not in _names():
        return None
    order = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(order, step.args, strict=False)) | step.kwargs
    return given if given.keys() <= {*order, "scale", "enable_gqa"} else None


def shape_of(step: CallOp) -> AttentionShape | None:
    """What a step computes, if it is attention on the CPU without dropout, over four dimensions,
    and its result lies as one of this package's kernels can make it."""
    given = _arguments(step)
    if given is None:
        return None

    def kind(name: str) -> TensorKind | None:
        value = given.get(name)
        return step.tensors.get(value.name) if isinstance(value, Name) else None

    query, key, value, mask = map(kind, ("query", "key", "value", "attn_mask"))
    result = step.tensors.get(step.output)
    scale, causal = given.get("scale"), given.get("is_causal", False)
    if (
        query is None
        or key is None
        or value is None
        or result is None
        or (mask is None and given.get("attn_mask") is not None)
        or given.get("dropout_p", 0.0) != 0.0
        or not isinstance(causal, bool)
        or (causal and mask is not None)
        or not (scale is None or (isinstance(scale, (int, float)) and scale > 0))
        or any(len(each.shape) != 4 for each in (query, key, value, result))
        or not all(device_row(each.device).own_kernels for each in (query, key, value, result))
        or not query.dtype == key.dtype == value.dtype == result.dtype
        or not _go_together(query, key, value)
        or not (mask is None or _fits(mask, query, key))
    ):
        return None
    shape = (*query.shape[:3], value.shape[3])
    _, heads, rows, size = shape
    lies = [
        (heads * rows * size, rows * size, size, 1),
        (rows * heads * size, size, heads * size, 1),
    ]
    matches = [_lies(result, strides) for strides in lies]
    if result.shape != shape or not any(matches):
        return None
    scale = None if scale is None else float(scale)
    return AttentionShape(query, key, value, mask, causal, scale, rows_outside=not matches[0])


def _go_together(query: TensorKind, key: TensorKind, value: TensorKind) -> bool:
    """Whether heads and sizes are known, and fit."""
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
    known = all(each.is_Integer for each in (heads, kv_heads, size, value.shape[3]))
    return (
        known
        and kv_heads >= 1
        and heads % kv_heads == 0
        and 1 <= size <= LARGEST_HEAD
        and 1 <= value.shape[3] <= LARGEST_HEAD
        and key.shape == (query.shape[0], kv_heads, key.shape[2], size)
        and value.shape[:3] == key.shape[:3]
    )


def _fits(mask: TensorKind, query: TensorKind, key: TensorKind) -> bool:
    wanted = (*query.shape[:3], key.shape[2])
    pairs = zip(mask.shape[::-1], wanted[::-1], strict=False)
    return (
        2 <= len(mask.shape) <= 4
        and device_row(mask.device).own_kernels
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
        and all(have in (1, want) for have, want in pairs)
    )


def _lies(tensor: TensorKind, strides: tuple[Any, ...]) -> bool:
    """Whether a tensor's strides are these, where they mean something."""
    dims = zip(tensor.shape, tensor.strides, strides, strict=True)
    return all(size == 1 or have == want for size, have, want in dims)


# --- rewriting -------------------------------------------------------------------------


def rewrite(split: Split, chosen: Mapping[AttentionShape, str]) -> Split:
    """Replace attention by the variants chosen for its shapes; shapes that are not in `chosen`, or
    have "torch" there, keep what they are."""
    steps = list(split.steps)
    for index, shape in find(split):
        variant = VARIANTS.get(chosen.get(shape, "torch"))
        if variant is None:
            continue
        step = steps[index]
        assert isinstance(step, CallOp)
        given = _arguments(step)
        assert given is not None
        target, options = variant.call(shape)
        args = tuple(given.get(name) for name in ("query", "key", "value", "attn_mask"))
        steps[index] = replace(step, target=target, args=args, kwargs=options)
    return replace(split, steps=tuple(steps))


def products(shape: AttentionShape, size: int) -> int:
    """Multiplications of attention at a size."""
    heads, keys, values = shape.query.shape_at(size), shape.key.shape_at(size)[2], shape.value
    return math.prod(heads[:3]) * keys * (heads[3] + values.shape_at(size)[3])
