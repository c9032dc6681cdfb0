"""Find what quantises a norm, by trying it.

Models write a quantisation in many ways, e2m1 in tables, comparisons or bit by bit. So what leads
from the norm to a quantised tensor is not compared step by step: it is run on random norms, and is
the operator's quantisation where it gives what `reference.quantise` gives, but for values that lie
so close to the middle between two codes that the order of roundings decides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..collectives import reference
from ..collectives.policy import Quant
from ..torch_internals.graphs import real_tensors
from ..torch_internals.operators import is_random
from ..torch_internals.sizes import size_at, statically_equal
from .base import current_range
from .match import Match, Miss, check_order
from .nodes import describe, name_of, value

FP8 = reference.FP8
TRIED = 8192
"""Values that are tried at least."""
NEAR_MIDDLES = 0.02
"""The most of them, as a share, that may get the neighbouring code."""


@dataclass(frozen=True)
class Kind:
    """A quantisation that the operator has."""

    quant: Quant
    takes_scale: bool | None
    """Whether the model gives a scale; None where it may be left out, for 1."""
    scale: Callable[[Tensor], float]
    """A scale for a norm, with which a few values are too large for the codes."""
    values_for_scale: int
    """How many values share a scale that is a result; 0: there is none."""
    scales_dtype: torch.dtype = torch.float32


def _largest(norm: Tensor) -> float:
    return float(norm.abs().max())


KINDS: dict[torch.dtype, Callable[[int], tuple[Kind, ...]]] = {
    FP8: lambda hidden: (
        Kind("fp8_static", True, lambda norm: _largest(norm) / 600, 0),
        Kind("fp8_token", False, lambda norm: 1.0, hidden),
    ),
    torch.uint8: lambda hidden: (
        Kind(
            "nvfp4",
            None,
            lambda norm: 448 * 6 / _largest(norm),
            reference.FP4_BLOCK,
            FP8,
        ),
    ),
}
"""Quantisations by the dtype of their values, for rows of so many."""


def find_quantisation(found: Match) -> None:
    """Add to a match what quantises its norm, if the operator has it; else a note that says why
    not. Of several, the last that the operator has."""
    norm = found.norms[0]
    reach = _Reach(found)
    count = value(norm).numel()
    for node in reversed(reach.order):
        own = value(node)
        if node not in reach.following or not isinstance(own, Tensor) or own.dtype not in KINDS:
            continue
        codes = 2 * own.numel() if own.dtype == torch.uint8 else own.numel()
        if not statically_equal(codes, count):
            continue
        try:
            _add(found, node, reach)
        except Miss as miss:
            found.note = found.note or str(miss)
        else:
            found.note = ""
            return


def _add(found: Match, node: fx.Node, reach: _Reach) -> None:
    misses = []
    for kind in KINDS[value(node).dtype](found.hidden):
        try:
            with real_tensors():
                inverse, holders = _tried(kind, found, node, reach)
        except Miss as miss:
            misses.append(str(miss))
            continue
        inner = reach.between(node)
        # Of several nodes that hold the scales, one that is used for more than the values.
        scales = next((h for h in holders if not set(inner).issuperset(h.users)), None)
        inner = reach.between(node, *([scales] if scales else []))
        following = [each for each in inner if each in reach.following]
        for each in following:
            others = [user for user in each.users if user not in following]
            if each not in (node, scales) and others:
                raise Miss(f"{describe(each)} has other users: {describe(others[0])}")
        roots = [each for each in inner if each in reach.roots]
        check_order(found, roots)
        found.quant, found.quantised, found.scales = kind.quant, node, scales
        found.quant_scale, found.scale_is_inverse = roots[0] if roots else None, inverse
        found.inner |= {*following}
        return
    raise Miss("; ".join(misses))


class _Reach:
    """What can be computed from a norm, scalars and constants alone."""

    def __init__(self, found: Match) -> None:
        self.following: set[fx.Node] = set()
        """What follows from the norm."""
        self.roots: set[fx.Node] = set()
        """Scalars that come from elsewhere."""
        self.order: list[fx.Node] = []
        """All of it but the norm, in the graph's order."""
        norms, known = set(found.norms), set(found.norms)
        for node in found.reduce.graph.nodes:
            if node in norms or node.op not in ("placeholder", "call_function", "get_attr"):
                continue
            inputs = node.all_input_nodes
            if _is_pure(node) and all(each in known for each in inputs):
                if any(each in norms or each in self.following for each in inputs):
                    self.following.add(node)
            elif _is_scalar(value(node)):
                self.roots.add(node)
            elif not _is_size(value(node)):
                continue
            known.add(node)
            self.order.append(node)

    def between(self, *nodes: fx.Node) -> list[fx.Node]:
        """What nodes are computed from, with themselves and without the norm, in order."""
        needed, stack = set(), [*nodes]
        while stack:
            each = stack.pop()
            if each not in needed:
                needed.add(each)
                stack += [] if each in self.roots else each.all_input_nodes
        return [each for each in self.order if each in needed]


def _is_pure(node: fx.Node) -> bool:
    """Whether a node is an operator of torch's own that gives the same for the same."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    return name_of(node).startswith(("aten::", "prims::")) and not is_random(node.target)


def _is_scalar(given: Any) -> bool:
    return (
        isinstance(given, Tensor)
        and given.dtype == torch.float32
        and all(statically_equal(n, 1) for n in given.shape)
    )


def _is_size(given: Any) -> bool:
    return isinstance(given, (int, torch.SymInt))


# --- trying ----------------------------------------------------------------------------


def _tried(kind: Kind, found: Match, node: fx.Node, reach: _Reach) -> tuple[bool, list[fx.Node]]:
    """Whether the scale that a node's steps take is the reciprocal of the operator's, and the
    nodes that hold the scales that are results.

    Raises:
        Miss: when the steps are not of this kind.
    """
    roots = [each for each in reach.between(node) if each in reach.roots]
    if len(roots) > 1:
        raise Miss(f"{describe(node)} takes {len(roots)} scales: {', '.join(map(str, roots))}")
    if kind.takes_scale is not None and kind.takes_scale != bool(roots):
        has = "takes a scale" if kind.takes_scale else "takes none"
        given = "one is" if roots else "none is"
        raise Miss(f"{describe(node)} is not {kind.quant}, which {has}: {given} given")
    shares = []
    for inverse in (False, True) if roots else (False,):
        share, holders = _compared(kind, found, node, reach, inverse)
        if share <= NEAR_MIDDLES:
            return inverse, holders
        shares.append(share)
    raise Miss(
        f"{describe(node)} is not {kind.quant}: of the values that were tried "
        f"{100 * min(shares):.1f} % came out differently"
    )


def _compared(
    kind: Kind, found: Match, node: fx.Node, reach: _Reach, inverse: bool
) -> tuple[float, list[fx.Node]]:
    """The share of values that come out otherwise than the reference's, and what holds the
    scales."""
    holders = [each for each in reach.following if _may_hold(each, kind, found)]
    steps = reach.between(node, *holders)
    roots = [each for each in steps if each in reach.roots]
    wrong = dict.fromkeys((node, *holders), 0)
    counted = dict.fromkeys(wrong, 0)
    for norm in _trials(found):
        scale = kind.scale(norm)
        given = {root: _filled(root, 1 / scale if inverse else scale, norm) for root in roots}
        got = _run(found, norm, steps, given)
        if not roots:
            scale = 1.0
        takes = kind.takes_scale is not False
        quant_scale = torch.tensor(scale, device=norm.device) if takes else None
        values, scales = reference.quantise(norm, quant_scale, kind.quant)
        for each in wrong:
            off = _off(got[each], values if each is node else scales)
            wrong[each] += int(off.sum())
            counted[each] += off.numel()
    share = {each: wrong[each] / counted[each] for each in wrong}
    right = [each for each in reach.order if each in holders and share[each] <= NEAR_MIDDLES]
    return share[node], right


def _may_hold(node: fx.Node, kind: Kind, found: Match) -> bool:
    own = value(node)
    return (
        kind.values_for_scale > 0
        and isinstance(own, Tensor)
        and own.dtype == kind.scales_dtype
        and statically_equal(own.numel() * kind.values_for_scale, value(found.norms[0]).numel())
    )


def _trials(found: Match) -> Iterator[Tensor]:
    """Random norms of a shape that the range has, in the input's dtype. What has a scale of its
    own is of many sizes."""
    given = value(found.norms[0])
    shape = [size_at(size, _size()) for size in given.shape]
    generator = torch.Generator().manual_seed(0)
    tried = 0
    while tried < TRIED:
        norm = torch.randn(shape, generator=generator)
        sizes = torch.rand((*shape[:-1], -(-shape[-1] // 16)), generator=generator)
        norm *= (0.05 + 4 * sizes).repeat_interleave(16, -1)[..., : shape[-1]]
        yield norm.to(found.dtype).to(given.device)
        tried += norm.numel()


def _size() -> int:
    """A small size of the range, with rows enough for them to differ."""
    return min(max(current_range().start, 3), current_range().end)


def _filled(root: fx.Node, number: float, norm: Tensor) -> Tensor:
    return torch.full([1] * value(root).dim(), number, device=norm.device)


def _run(
    found: Match, norm: Tensor, steps: list[fx.Node], given: dict[fx.Node, Tensor]
) -> dict[fx.Node, Any]:
    """What the steps give for a norm and a scale."""
    size = _size()
    known: dict[fx.Node, Any] = dict(given)
    for node in found.norms:
        own = value(node)
        known[node] = norm.to(own.dtype).reshape([size_at(n, size) for n in own.shape])
    for node in (each for each in steps if each not in given):
        if _is_size(value(node)):
            known[node] = size_at(value(node), size)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        assert callable(node.target)
        try:
            known[node] = node.target(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise Miss(f"{describe(node)} cannot be tried: {reason}") from error
    return known


def _codes(values: Tensor) -> Tensor:
    """Where each value stands among those that its dtype has."""
    codes = values.reshape(-1).view(torch.uint8).int()
    if values.dtype == FP8:
        return torch.where(codes < 128, codes, 128 - codes)
    codes = torch.stack([codes & 15, codes >> 4], -1).reshape(-1)
    return torch.where(codes < 8, codes, 8 - codes)


def _off(got: Tensor, expected: Tensor) -> Tensor:
    """Where values are neither equal nor, as codes, neighbours (2), or are neighbours (1)."""
    if got.dtype == torch.float32:
        return 2 * ~torch.isclose(got.reshape(-1), expected.reshape(-1), rtol=1e-5, atol=0)
    return (_codes(got) - _codes(expected)).abs().clamp(max=2)
