"""The dimensions that change from call to call, and the size that follows from them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InvalidDynamicDims
from ..torch_internals.sizes import dim_symbol, floor_div

if TYPE_CHECKING:
    import sympy

Lengths = tuple[int, ...]
"""How long each dimension of a `Dims` is, in its order."""


@dataclass(frozen=True)
class Dims:
    """The dynamic dimensions of a model.

    Raises:
        InvalidDynamicDims: for a size that is no sum of products of the names.
    """

    names: tuple[str, ...] = ("size",)
    largest: Lengths = ()
    """The greatest length of each; () where the largest size says it all."""
    size: str = "size"
    """The size as Python over the names: sums and products of them, and of numbers."""
    typical: Lengths = (1,)
    """Lengths that go together, which others are scaled from."""

    def __post_init__(self) -> None:
        _check(self.size, self.names)

    @property
    def is_size_alone(self) -> bool:
        """Whether the one dimension is the size."""
        return self.names == ("size",)

    @functools.cached_property
    def _code(self) -> object:
        return compile(self.size, "<size>", "eval")

    def size_at(self, lengths: Sequence[int]) -> int:
        """The size of a call."""
        if self.is_size_alone:
            return lengths[0]
        found: int = eval(self._code, dict(zip(self.names, lengths, strict=True)))  # type: ignore[arg-type]
        return found

    @functools.cached_property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """One for each dimension."""
        return tuple(map(dim_symbol, self.names))

    @functools.cached_property
    def size_expr(self) -> sympy.Expr:
        """The size over the symbols."""
        found: sympy.Expr = eval(
            self._code,  # type: ignore[arg-type]
            dict(zip(self.names, self.symbols, strict=True)),
        )
        return found

    def near(self, size: int) -> Lengths:
        """Lengths of a call whose size is at most this, and as near as scaling typical ones
        comes."""
        if self.is_size_alone:
            return (size,)

        def scaled(thousandths: int) -> Lengths:
            return tuple(
                min(max(1, each * thousandths // 1000), most)
                for each, most in zip(self.typical, self.largest, strict=True)
            )

        low, high = 0, 1000 * max(self.largest)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.size_at(scaled(middle)) <= size else (low, middle - 1)
            )
        return scaled(low)

    def values(self, size: int) -> dict[str, int]:
        """The dimensions of such a call by name, and its size."""
        return {**dict(zip(self.names, self.near(size), strict=True)), "size": size}

    def bounds(self, start: int, end: int) -> list[tuple[int, int]] | None:
        """The least and the greatest length of each dimension in calls whose sizes are in a range;
        None when there are none."""
        if self.is_size_alone:
            return [(start, end)]
        ones = [1] * len(self.names)
        if self.size_at(ones) > end or self.size_at(self.largest) < start:
            return None
        found = []
        for index, most in enumerate(self.largest):

            def size(length: int, others: Sequence[int], index: int = index) -> int:
                return self.size_at([*others[:index], length, *others[index + 1 :]])

            # Sizes grow with each length.
            first = _first(1, most, lambda n: size(n, self.largest) >= start)
            above = _first(1, most + 1, lambda n, most=most: n > most or size(n, ones) > end)  # type: ignore[misc]
            found.append((first, above - 1))
        return found

    def samples(self, first: Lengths, largest_size: int) -> Iterator[Lengths]:
        """The lengths of the first call, and then all ways to have each 1, 2 or the greatest."""
        yield first
        each = [sorted({1, min(2, most), most}) for most in self.largest]
        for lengths in _product(each):
            if self.size_at(lengths) <= largest_size and lengths != first:
                yield lengths

    def in_size(self, expr: Any) -> Any:
        """About what an expression is, over the size alone."""
        if self.is_size_alone or isinstance(expr, int):
            return expr
        import sympy

        size = dim_symbol("size")
        if expr == self.size_expr:
            return size
        whole = self.size_at(self.typical)
        return expr.xreplace(
            {
                symbol: sympy.Max(1, floor_div(size, max(1, whole // length)))
                for symbol, length in zip(self.symbols, self.typical, strict=True)
            }
        )


def out_of_plan(dims: Dims, lengths: Lengths, max_size: int) -> str:
    """What of a call is greater than is planned for, and how to mend it; "" when nothing is."""
    size = dims.size_at(lengths)
    if size > max_size:
        return f"size {size} is outside the plan's [1,{max_size}]: raise max_size"
    for name, length, most in zip(dims.names, lengths, dims.largest, strict=False):
        if length > most:
            return f"{name} {length} is above the {most} of max_dims: raise it"
    return ""


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first integer of an interval at which something holds that then goes on holding."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _product(each: Sequence[Sequence[int]]) -> Iterator[Lengths]:
    if not each:
        yield ()
        return
    for rest in _product(each[:-1]):
        for last in each[-1]:
            yield (*rest, last)


def _check(code: str, names: Sequence[str]) -> None:
    try:
        tree = ast.parse(code, mode="eval").body
    except SyntaxError:
        tree = ast.Constant(None)
    used: set[str] = set()

    def grows(node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            used.add(node.id)
            return node.id in names
        if isinstance(node, ast.Constant):
            return type(node.value) is int and node.value > 0
        return (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, (ast.Add, ast.Mult))
            and grows(node.left)
            and grows(node.right)
        )

    if not grows(tree) or not used:
        raise InvalidDynamicDims(
            f"size is {code!r}, but must be a sum or product of {', '.join(names)} and of positive "
            f"integers, such as {'*'.join(names)!r}"
        )


SIZE_ALONE = Dims()
"""One dimension, which is the size."""
