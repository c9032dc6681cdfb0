"""Sizes as symbols: what a graph says of its size, and a ShapeEnv of its own for each range."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .probe import require

if TYPE_CHECKING:
    import sympy


@functools.cache
def dim_symbol(name: str) -> sympy.Symbol:
    """The symbol that all of a graph's own ones for a dynamic dimension are written as."""
    import sympy

    return sympy.Symbol(name, integer=True, nonnegative=True)


def size_symbol() -> sympy.Symbol:
    """That of the size, where it is the one dynamic dimension."""
    return dim_symbol("size")


def statically_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every size of the range, without adding a guard."""
    require("sizes")
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def statically_at_most(size: int | torch.SymInt, bound: int) -> bool:
    """Whether a size is at most `bound` for every size of the range, without a guard."""
    require("sizes")
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size <= bound))


def statically_divisible(size: int | torch.SymInt, by: int) -> bool:
    """Whether `by` divides a size for every size of the range, without a guard."""
    require("sizes")
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size % by == 0))


def expression_of(value: object) -> sympy.Basic | None:
    """The expression of a symbolic int, float or bool; the number of a plain one; or None."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    if isinstance(value, (bool, int)):
        import sympy

        return sympy.sympify(value)
    return None


Symbols = Mapping["sympy.Symbol", "sympy.Expr"]
"""What each symbol of a captured graph is in terms of those of the dynamic dimensions: one of them
or, for the stride of an argument that is not contiguous, what follows from them."""


def in_terms_of_size(expr: sympy.Basic, symbols: Symbols) -> sympy.Basic:
    """The expression over the symbols of the dynamic dimensions."""
    return expr.xreplace(dict(symbols))


def equals(one: sympy.Basic, other: object) -> Any:
    """The condition that two expressions are equal; True where they always are."""
    import sympy

    condition = sympy.Eq(one, sympy.sympify(other))
    return True if condition == sympy.true else condition


def symbols_in(values: Sequence[Any]) -> frozenset[sympy.Symbol]:
    """The symbols that occur in tensors' shapes and strides and in symbolic integers."""
    found: set[sympy.Symbol] = set()
    for value in values:
        parts = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        for part in parts:
            if isinstance(part, torch.SymInt):
                found |= part.node.expr.free_symbols
    return frozenset(found)


Place = tuple[int, int | None]
"""Where a size is read: the index of an argument and, of a tensor, the dimension."""


def size_place(values: Sequence[Any], symbols: Symbols) -> Place | None:
    """Where a graph's inputs hold the size; None when it has no symbol.

    Raises:
        LookupError: when no input is the size itself or has it as a dimension.
    """
    if not symbols:
        return None
    for index, value in enumerate(values):
        if isinstance(value, torch.SymInt) and value.node.expr in symbols:
            return index, None
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            for dim, length in enumerate(value.shape):
                if isinstance(length, torch.SymInt) and length.node.expr in symbols:
                    return index, dim
    raise LookupError(str(symbols))


def size_finder(place: Place | None) -> Callable[[Sequence[Any]], int]:
    """A function that reads the size off a graph's inputs; 1 where there is no place."""
    if place is None:
        return lambda args: 1
    index, dim = place
    if dim is None:
        return lambda args: int(args[index])
    return lambda args: int(args[index].shape[dim])


def floor_div(expr: sympy.Expr, by: int) -> sympy.Expr:
    """An expression divided by a number, rounded down."""
    require("sizes")
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(expr, by)


def python_code(expr: sympy.Basic) -> str:
    """Python source that computes an expression over variables named as its symbols (and
    `math`)."""
    require("sizes")
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expr))


def as_nodes(expr: sympy.Basic, graph: fx.Graph, nodes: Mapping[sympy.Symbol, fx.Node]) -> Any:
    """Insert nodes into a graph that compute an expression from those of its symbols."""
    require("sizes")
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in nodes.items()}
    value = sympy_interp(PythonReferenceAnalysis, proxies, expr)
    return value.node if isinstance(value, fx.Proxy) else value


def size_at(given: Any, size: int) -> int:
    """What a dimension that depends on the size of a range is at one size; where it depends on
    several dimensions, what it is where the compiler tunes."""
    if not isinstance(given, torch.SymInt):
        return int(given)
    expression = given.node.expr
    if len(expression.free_symbols) > 1:
        return int(given.node.hint)
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, size)))


def layout_at(
    tensor: torch.Tensor, symbols: Symbols, lengths: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Shape and strides of a captured (fake) tensor where the dynamic dimensions, by name, are so
    long."""
    import sympy

    own = {dim_symbol(name): sympy.Integer(length) for name, length in lengths.items()}

    def number(value: int | torch.SymInt) -> int:
        expr = expression_of(value)
        assert expr is not None
        return int(in_terms_of_size(expr, symbols).xreplace(own))

    return [number(each) for each in tensor.shape], [number(each) for each in tensor.stride()]


@dataclass(frozen=True)
class Extent:
    """How long a dynamic dimension may be in a range, both ends included."""

    name: str
    start: int
    end: int
    hint: int
    """The length that the compiler tunes for."""


@dataclass(frozen=True)
class RangeShapes:
    """A fresh ShapeEnv whose symbols are the dynamic dimensions of a range."""

    env: Any
    fake_mode: Any
    extents: tuple[Extent, ...]
    lengths: tuple[int | torch.SymInt, ...]
    """The dimensions in this environment; a plain int for one of a single length."""
    own: Mapping[sympy.Symbol, Extent]
    """The symbols. A length says no longer which was its own once a compiler has replaced it."""

    @property
    def symbols(self) -> Symbols:
        """What the symbols mean."""
        return {symbol: dim_symbol(extent.name) for symbol, extent in self.own.items()}

    @property
    def bounds(self) -> dict[sympy.Symbol, tuple[int, int]]:
        """The intervals that the symbols started with."""
        return {symbol: (extent.start, extent.end) for symbol, extent in self.own.items()}

    def value(self, like: object, symbols: Symbols) -> Any:
        """A placeholder's captured value, made anew with its sizes in this environment."""
        if isinstance(like, torch.Tensor):
            with torch.inference_mode(False), self.fake_mode:
                return torch.empty_strided(
                    [self._dim(d, symbols) for d in like.shape],
                    [self._dim(d, symbols) for d in like.stride()],
                    dtype=like.dtype,
                    device=like.device,
                )
        return self._dim(like, symbols)

    def _dim(self, value: Any, symbols: Symbols) -> int | torch.SymInt:
        import sympy

        expr = expression_of(value)
        assert expr is not None
        expr = in_terms_of_size(expr, symbols)
        own: dict[sympy.Symbol, sympy.Expr] = {}
        hints: dict[sympy.Symbol, sympy.Expr] = {}
        for extent, length in zip(self.extents, self.lengths, strict=True):
            symbol = dim_symbol(extent.name)
            if expr == symbol:
                return length
            own[symbol] = sympy.Integer(length) if isinstance(length, int) else length.node.expr
            hints[symbol] = sympy.Integer(extent.hint)
        made = expr.xreplace(own)
        if not made.free_symbols:
            return int(made)
        found: torch.SymInt = self.env.create_symintnode(made, hint=int(expr.xreplace(hints)))
        return found


def range_shapes(extents: Sequence[Extent]) -> RangeShapes:
    """A ShapeEnv of its own for dimensions; no symbol for one that has a single length."""
    require("sizes")
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StrictMinMaxConstraint,
    )
    from torch.utils._sympy.value_ranges import ValueRanges

    # Duck shaping would make another dimension that equals the hint the same symbol.
    env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)

    def length_in(extent: Extent) -> int | torch.SymInt:
        if extent.start == extent.end:
            return extent.start
        source = ConstantSource(extent.name)
        bounds = ValueRanges(extent.start, extent.end)
        symbol = env.create_symbol(
            extent.hint,
            source=source,
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=StrictMinMaxConstraint(warn_only=False, vr=bounds),
            do_not_specialize_zero_one=True,
        )
        made: int | torch.SymInt = env.create_symintnode(symbol, hint=extent.hint, source=source)
        return made

    lengths = tuple(map(length_in, extents))
    pairs = zip(lengths, extents, strict=True)
    own = {length.node.expr: each for length, each in pairs if isinstance(length, torch.SymInt)}
    return RangeShapes(env, mode, tuple(extents), lengths, own)
