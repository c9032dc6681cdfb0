"""Which values of a graph are views of memory that another one made, and how to make them anew.

A compiled piece returns memory of its own only. What a graph returns, or takes past a splitting
op, and is a view of an argument, of a tensor of the module or of what a piece returns already, is
made outside the pieces from the tensor of this call: its shape, strides and offset follow from the
size as they did at capture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedGraph
from ..torch_internals.sizes import floor_div
from ..torch_internals.tensors import memory_of
from .overlap import Place, extent, share_memory

Call = tuple[Any, tuple[Any, ...]]
"""An operator, and its arguments after the tensor that the call before it made."""

Integer = Callable[[Any], Any]
"""Makes an expression over the size, or a number, of a captured size, stride or offset."""


def same_object(node: fx.Node) -> fx.Node | None:
    """The input that a node returns as it is, as updates in place and `contiguous()` do."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return None
    return next((n for n in _tensors_into(node) if n.meta.get("example_value") is value), None)


def ancestry(node: fx.Node, is_given: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """A value and those that it is a view of, each of the next, up to the one that made the memory
    or is given to the graph."""
    chain = [node]
    while not is_given(chain[-1]):
        source = _source(chain[-1])
        if source is None:
            break
        chain.append(source)
    return chain


def _source(node: fx.Node) -> fx.Node | None:
    memory = memory_in(node)
    return next(
        (n for n in _tensors_into(node) if memory is not None and memory_in(n) == memory), None
    )


def _tensors_into(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs of a node; for an element of a tuple, those of the operator that returned it."""
    for each in node.all_input_nodes:
        if isinstance(each.meta.get("example_value"), (tuple, list)):
            yield from _tensors_into(each)
        else:
            yield each


def memory_in(node: fx.Node) -> int | None:
    """What the values of two nodes have in common that lie in the same memory."""
    value = node.meta.get("example_value")
    return memory_of(value) if isinstance(value, torch.Tensor) else None


def in_memory_of(
    root: torch.Tensor, view: torch.Tensor, integer: Integer
) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    """Shape, strides and offset of a view in elements of its own, from where another starts."""
    wide, own = view.element_size(), root.element_size()
    ahead = integer(view.storage_offset()) * wide - integer(root.storage_offset()) * own
    return tuple(map(integer, view.shape)), tuple(map(integer, view.stride())), ahead / wide


def calls_for(root: torch.Tensor, view: torch.Tensor, integer: Integer) -> list[Call]:
    """Operators that make a view from the tensor whose memory it is in, wherever that one lies.

    Args:
        root: the captured value of the tensor that is there.
        view: the captured value of its view.
        integer: what makes an expression of a captured size, stride or offset.
    """
    aten = torch.ops.aten
    shape, strides, ahead = in_memory_of(root, view, integer)
    wide, own = view.element_size(), root.element_size()
    calls: list[Call] = []
    # Without elements, at every size or at some, it may lie beyond the memory.
    there = _has_elements(shape)
    ahead = ahead * there
    if ahead != 0 or view.dtype != root.dtype:
        # Only a tensor's own offset is known, and only at a call: shift a flat view of it.
        length = ahead + extent(shape, strides) * there
        part = own // wide  # above 1 where an element of the memory holds several
        flat = floor_div(length + part - 1, part) if part > 1 else length * wide / own
        calls.append((aten.as_strided.default, ((flat,), (1,))))
        if view.dtype != root.dtype:
            calls.append((aten.view.dtype, (view.dtype,)))
        if ahead != 0:
            calls.append((aten.slice.Tensor, (0, ahead)))
    calls.append((aten.as_strided.default, (shape, strides)))
    if view.is_conj() != root.is_conj():
        calls.append((aten._conj.default, ()))
    if view.is_neg() != root.is_neg():
        calls.append((aten._neg_view.default, ()))
    return calls


def _has_elements(shape: Sequence[Any]) -> Any:
    """1 at the sizes at which a tensor has elements, and 0 at others."""
    import sympy

    # Dynamic dimensions are at least 1, and so are products of them; a part of one may be empty.
    return sympy.Min(1, *(each for each in shape if not _is_product(each)))


def _is_product(length: Any) -> bool:
    import sympy

    factors = sympy.Mul.make_args(length)
    return all(each.is_Symbol or each.is_positive for each in factors)


def views_among(
    inputs: Sequence[fx.Node],
    updated: Sequence[fx.Node],
    integer: Integer,
    is_given: Callable[[fx.Node], bool],
    bound: Collection[str],
) -> dict[fx.Node, fx.Node]:
    """Which of some inputs are views of which other, where several lie in memory that is updated.

    Each argument of a call counts as memory of its own, also where two overlapped at capture.

    Args:
        inputs: the inputs of a piece.
        updated: what it updates in place.
        integer: what makes an expression of a captured size, stride or offset.
        is_given: whether a value is there without any piece.
        bound: names of the graph's inputs that the module holds.

    Raises:
        UnsupportedGraph: when none of those that overlap holds all of that memory.
    """
    changed = {memory_in(node) for node in updated} - {None}
    families: dict[int | None, list[fx.Node]] = {}
    for node in inputs:
        if (memory := memory_in(node)) in changed:
            families.setdefault(memory, []).append(node)
    arguments: dict[fx.Node, fx.Node] = {}
    """The argument that a value is, or is a view of."""
    for node in inputs:
        root = ancestry(node, is_given)[-1]
        if root.op == "placeholder" and root.name not in bound:
            arguments[node] = root

    def apart(a: fx.Node, b: fx.Node) -> bool:
        if a in arguments and b in arguments and arguments[a] is not arguments[b]:
            return True
        return _apart(a.meta["example_value"], b.meta["example_value"], integer)

    views: dict[fx.Node, fx.Node] = {}
    for family in (group for each in families.values() for group in _groups(each, apart)):
        whole = (base for base in family if all(_holds(base, n, integer, is_given) for n in family))
        base = next(whole, None)
        if base is None or len({arguments[n] for n in family if n in arguments}) > 1:
            raise UnsupportedGraph(
                f"{', '.join(node.name for node in family)} overlap in memory and one is updated "
                f"in place, but none holds all of it: give the model the tensor that they are "
                f"views of, or update it out of place"
            )
        views |= {node: base for node in family if node is not base}
    return views


def _groups(
    family: Sequence[fx.Node], apart: Callable[[fx.Node, fx.Node], bool]
) -> list[list[fx.Node]]:
    """What of a family hangs together."""
    groups: list[list[fx.Node]] = []
    for node in family:
        near = [group for group in groups if not all(apart(node, other) for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([*(other for group in near for other in group), node])
    return [sorted(group, key=family.index) for group in groups]


def _apart(a: torch.Tensor, b: torch.Tensor, integer: Integer) -> bool:
    """Whether two tensors in the same memory have none of it in common, at every size."""
    sides = []
    for value in (a, b):
        shape, strides = tuple(map(integer, value.shape)), tuple(map(integer, value.stride()))
        start, wide = integer(value.storage_offset()) * value.element_size(), value.element_size()
        sides.append((start, start + wide * extent(shape, strides), wide, shape, strides))
    (start, end, *_), (other, other_end, *_) = sides
    if (other - end).is_nonnegative or (start - other_end).is_nonnegative:
        return True
    if any(n.free_symbols for start, _, _, *dims in sides for n in (start, *dims[0], *dims[1])):
        return False
    places = [
        Place(int(start), wide, tuple(map(int, shape)), tuple(map(int, strides)))
        for start, _, wide, shape, strides in sides
    ]
    return not share_memory(*places)


def _holds(
    base: fx.Node, node: fx.Node, integer: Integer, is_given: Callable[[fx.Node], bool]
) -> bool:
    """Whether a tensor lies in the memory of another at every size, as elements of its kind."""
    of, value = base.meta["example_value"], node.meta["example_value"]
    if value.dtype != of.dtype or value.is_conj() != of.is_conj() or value.is_neg() != of.is_neg():
        return False
    if base in ancestry(node, is_given):
        return True
    shape, strides, ahead = in_memory_of(of, value, integer)
    own = extent(tuple(map(integer, of.shape)), tuple(map(integer, of.stride())))
    room = own - ahead - extent(shape, strides)
    return bool(ahead.is_nonnegative and room.is_nonnegative)
