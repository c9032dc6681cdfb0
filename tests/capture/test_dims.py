"""Several dynamic dimensions and the size that follows from them."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from splitpoint import errors
from splitpoint.capture.dims import SIZE_ALONE, Dims

SIZES = ("a*b", "a", "b + 3", "2*a*b + a", "a + b")


@st.composite
def dims(draw: st.DrawFn) -> Dims:
    largest = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    typical = tuple(draw(st.integers(1, most)) for most in largest)
    return Dims(("a", "b"), largest, draw(st.sampled_from(SIZES)), typical)


@given(dims(), st.integers(1, 200), st.integers(0, 100))
def test_bounds_are_those_of_the_lengths_whose_sizes_are_in_a_range(
    of: Dims, start: int, more: int
) -> None:
    inside = [
        lengths
        for lengths in itertools.product(*(range(1, most + 1) for most in of.largest))
        if start <= of.size_at(lengths) <= start + more
    ]
    found = of.bounds(start, start + more)
    if found is None:
        assert not inside
    for lengths in inside:
        assert found is not None
        assert all(a <= n <= b for n, (a, b) in zip(lengths, found, strict=True))


@given(dims(), st.integers(1, 300))
def test_lengths_near_a_size_are_possible_and_not_above_it(of: Dims, size: int) -> None:
    near = of.near(size)
    assert all(1 <= n <= most for n, most in zip(near, of.largest, strict=True))
    assert of.size_at(near) <= max(size, of.size_at((1, 1)))
    if size == of.size_at(of.typical):
        assert of.size_at(near) == size
    assert of.values(size)["a"] == near[0]


@given(dims(), st.integers(1, 300))
def test_samples_are_possible_and_begin_with_the_first_call(of: Dims, largest: int) -> None:
    found = list(of.samples(of.typical, largest))
    assert found[0] == of.typical
    assert len(set(found)) == len(found)
    assert all(of.size_at(lengths) <= largest for lengths in found[1:])


def test_expressions_in_the_size() -> None:
    of = Dims(("batch", "length"), (8, 64), "batch*length", (2, 10))
    batch, length = of.symbols
    assert of.in_size(length * batch) == sympy.Symbol("size", integer=True, nonnegative=True)
    assert of.in_size(7) == 7
    about = of.in_size(batch)
    assert int(about.subs({next(iter(about.free_symbols)): 40})) == 4
    assert SIZE_ALONE.in_size(length) is length
    assert SIZE_ALONE.near(5) == (5,)
    assert SIZE_ALONE.bounds(2, 9) == [(2, 9)]


@pytest.mark.parametrize(
    "size", ["a-b", "a*c", "", "7", "a/b", "a**b", "f(a)", "a*-1", "a*0", "a b", "a*True"]
)
def test_a_size_that_does_not_grow_with_its_dimensions_is_refused(size: str) -> None:
    with pytest.raises(errors.InvalidDynamicDims, match="sum or product of a, b") as caught:
        Dims(("a", "b"), (4, 4), size, (1, 1))
    assert len(str(caught.value).splitlines()) <= 3
    assert math.prod(Dims(("a", "b"), (4, 4), "a*b", (1, 1)).largest) == 16
