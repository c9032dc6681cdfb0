"""One compiled model for arguments of several kinds."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitpoint import Config, Plan, Range, compile, errors

CONFIG = Config(max_size=32, split_points=[8], cache_dir="")
PLAIN = Config(max_size=32, split_points=[8], cache_dir="", backend="eager")
SIZES = (5, 1, 8, 9, 32)


def masked(
    x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0, *, back: str = "all"
) -> Any:
    y = x.float() * scale
    if mask is not None:
        y = y.masked_fill(mask, 0) if mask.dtype is torch.bool else y + mask
    return y if back == "all" else (y.sum(-1), len(back))


KINDS: list[dict[str, Any]] = [
    {},
    {"mask": lambda n: torch.rand(n, 4) > 0.5},
    {"mask": lambda n: torch.randn(n, 4)},
    {"mask": lambda n: torch.randn(4, n).T},
    {"scale": 2.0},
    {"scale": 2},
    {"scale": -0.0},
    {"scale": math.nan},
    {"back": "sums", "mask": lambda n: torch.randn(n, 4)},
]


def called(kind: dict[str, Any], size: int) -> dict[str, Any]:
    return {name: value(size) if callable(value) else value for name, value in kind.items()}


def check(compiled: Any, kind: dict[str, Any], size: int, **options: Any) -> None:
    x, given = torch.randn(size, 4, **options), called(kind, size)
    torch.testing.assert_close(compiled(x, **given), masked(x, **given), equal_nan=True)


def test_each_kind_of_arguments_has_its_own_graphs(tmp_path: Path) -> None:
    config = Config(max_size=32, split_points=[8], cache_dir=str(tmp_path), max_signatures=9)
    for loads in (False, True):
        compiled = compile(masked, config)
        for size in SIZES:
            for kind in KINDS:
                check(compiled, kind, size)
                check(compiled, kind, size)
        stats = compiled.stats()
        assert (stats.compilations == 0) is loads
        assert (stats.loads > 0) is loads
        assert stats.captures >= len(KINDS)
        assert stats.eager_calls == 0
        # At size 1 all layouts are the same.
        assert list(stats.kinds.values()) == [10, 10, 12, 8, *[10] * 5]
        assert sum(stats.dispatches.values()) == 2 * len(SIZES) * len(KINDS)
    plan = compiled.plan
    assert plan.ranges == (Range(1, 8), Range(9, 32))
    assert "mask is bool[size, 4]" in plan.kinds[1]
    assert "scale is 2.0" in plan.kinds[4]
    assert Plan.from_json(plan.to_json()) == plan
    assert f"arguments 2: {plan.kinds[1]}" in str(plan)
    assert "scale is nan" in str(stats)


@pytest.mark.parametrize("seed", range(20))
def test_calls_of_all_kinds_in_any_order_are_sent_right(seed: int) -> None:
    """Kinds that differ in several places, in first calls of any order."""
    chance = random.Random(seed)
    tensors = (
        None,
        lambda n: torch.randn(n, 2),
        lambda n: torch.randn(n),
        lambda n: torch.randn(2, n).T,
        lambda n: torch.zeros(n, 2, dtype=torch.int64),
        lambda n: [torch.randn(n), torch.randn(n)],
        lambda n: {"a": torch.randn(n)},
    )
    values = (None, 1, 1.0, True, "text", (1, 2), torch.float32)

    def describe(given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            return str(given.dtype), given.dim()
        if isinstance(given, (list, dict)):
            return type(given).__name__, len(given)
        return repr(given)

    def model(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return x + 1, [describe(each) for each in rest], {k: describe(v) for k, v in named.items()}

    kinds = [
        (
            [chance.choice(tensors) for _ in range(chance.randint(0, 2))],
            {k: chance.choice((*tensors, *values)) for k in "ab" if chance.random() < 0.7},
        )
        for _ in range(6)
    ]
    compiled = compile(model, Config(**{**vars(PLAIN), "max_signatures": 6}))
    for size, _ in itertools.product((3, 1, 8, 32), range(3)):
        for rest, named in chance.sample(kinds, len(kinds)):
            x = torch.randn(size, 4)
            args = [each(size) if callable(each) else each for each in rest]
            kwargs = {
                k: v(size) if callable(v) and v is not torch.float32 else v
                for k, v in named.items()
            }
            found, wanted = compiled(x, *args, **kwargs), model(x, *args, **kwargs)
            assert found[1:] == wanted[1:]
            torch.testing.assert_close(found[0], wanted[0])
    assert compiled.stats().eager_calls == 0


def test_weights_and_equal_pieces_are_shared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            x = self.first(x)
            x = torch.cumsum(x, 0)  # a splitting op: what is before it is equal for both kinds
            return self.second(x if mask is None else x + mask)

    config = Config(
        max_size=8,
        cache_dir="",
        splitting_ops=["aten::cumsum"],
        linear={"1-8": "packed"},
    )
    model = Model().eval().requires_grad_(False)
    compiled = compile(model, config)
    x, mask = torch.randn(3, 64), torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    before = compiled.stats()
    torch.testing.assert_close(compiled(x, mask), model(x, mask), rtol=1e-3, atol=1e-4)
    after = compiled.stats()
    assert after.packed_bytes == before.packed_bytes > 0
    assert after.compilations - before.compilations == 1
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.second.bias.add_(1)
    for given in ((x,), (x, mask)):
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-3, atol=1e-4)


def test_more_kinds_than_allowed_are_refused_by_what_changes() -> None:
    compiled = compile(masked, Config(**{**vars(PLAIN), "max_signatures": 3}))
    check(compiled, {"mask": KINDS[1]["mask"]}, 5)
    check(compiled, {"scale": 0.25}, 5)
    check(compiled, {"scale": 0.5}, 5)
    with pytest.raises(
        errors.TooManySignatures,
        match=r"3 kinds .* scale is 1\.0, is 0\.25, is 0\.5, now is 0\.75: ",
    ) as e:
        compiled(torch.randn(5, 4), scale=0.75)
    assert len(str(e.value).splitlines()) <= 3
    check(compiled, {"scale": 0.5}, 9)


def test_the_kind_that_was_one_too_many_is_named() -> None:
    compiled = compile(masked, Config(**{**vars(PLAIN), "max_signatures": 6}))
    for scale in range(6):
        check(compiled, {"scale": float(scale)}, 5)
    with pytest.raises(errors.TooManySignatures, match=r"is 3\.0, \.\.\., now is 77\.0: "):
        compiled(torch.randn(5, 4), scale=77.0)


def test_what_is_wrong_and_not_of_another_kind_stays_an_error() -> None:
    compiled = compile(masked, PLAIN, dynamic_dims={"x": 0, "mask": 0})
    for kind in KINDS[:3]:
        check(compiled, {"mask": None, **kind}, 5)
    x = torch.randn(5, 4)
    with pytest.raises(errors.SizeMismatch):
        compiled(x, mask=torch.randn(6, 4))
    with pytest.raises(errors.WrongDimension):
        compiled(torch.randn(5, 3))
    with pytest.raises(errors.GradientRequired):
        compiled(x, mask=torch.randn(5, 4, requires_grad=True))
    with pytest.raises(errors.WrongArguments):
        compiled()
    with pytest.raises(errors.SizeOutOfPlan):
        compiled(torch.randn(33, 4), scale=3.0)
    assert len(compiled.stats().kinds) == 3


def test_arguments_that_cannot_be_captured_are_told_from_those_that_could() -> None:
    def model(x: torch.Tensor, how: str = "add") -> torch.Tensor:
        if how != "add":
            raise NotImplementedError(how)
        return x + 1

    compiled = compile(model, PLAIN)
    x = torch.randn(5, 4)
    compiled(x)
    with pytest.raises(errors.CaptureError, match=r"raises NotImplementedError.*subtract"):
        compiled(x, how="subtract")
    torch.testing.assert_close(compiled(x), x + 1)
    assert compiled.stats().kinds == {}


@pytest.mark.parametrize("more", [{"lazy": True}, {"background": True}])
def test_kinds_of_which_some_ranges_are_compiled_later(more: dict[str, Any]) -> None:
    compiled = compile(masked, Config(max_size=32, split_points=[8], cache_dir="", **more))
    for kind in (*KINDS[:3], *KINDS[:3]):
        for size in SIZES:
            check(compiled, kind, size)
    assert compiled.wait()
    for kind in KINDS[:3]:
        check(compiled, kind, 9)
    compiled.close()


def test_size_zero_and_sizes_out_of_plan_of_a_new_kind() -> None:
    compiled = compile(masked, Config(max_size=8, on_out_of_plan="eager", cache_dir=""))
    check(compiled, KINDS[0], 5)
    check(compiled, KINDS[1], 0)
    check(compiled, KINDS[2], 9)
    assert compiled.stats().eager_calls == 2
    assert compiled.stats().kinds == {}


def test_dynamic_dims_may_name_an_argument_that_is_none_in_some_calls():
    def masked(x, mask=None):
        return x * 2 if mask is None else x * mask

    for first in (None, torch.rand(3, 4)):
        compiled = compile(masked, PLAIN, dynamic_dims={"x": 0, "mask": 0})
        for size in (3, 7):
            for mask in (first, None, torch.rand(size, 4)):
                x = torch.rand(size, 4)
                mask = None if mask is None else torch.rand(size, 4)
                torch.testing.assert_close(compiled(x, mask), masked(x, mask))
        assert compiled.stats().captures == 2


def test_calls_that_fail_leave_later_ones_as_they_were() -> None:
    model = nn.Linear(4, 4).eval().requires_grad_(False)

    def layer(x: torch.Tensor, a: torch.Tensor | None = None) -> torch.Tensor:
        y = nn.functional.linear(x, model.weight)
        return y if a is None else y + a

    compiled = compile(layer, Config(**{**vars(PLAIN), "max_signatures": 2}))
    x = torch.randn(16, 4)
    torch.testing.assert_close(compiled(x), layer(x))
    for wrong in (torch.randn(16, 3), torch.randn(16, 33)):
        with pytest.raises(errors.SplitpointError):
            compiled(wrong)
    with pytest.raises(RuntimeError, match="same dtype"):
        compiled(x.double())
    torch.testing.assert_close(compiled(x, a=x), layer(x, x))
    torch.testing.assert_close(compiled(x), layer(x))
    assert len(compiled.stats().kinds) == 2
    with pytest.raises(errors.WrongArguments, match=r": got an unexpected keyword argument 'b'$"):
        compiled(x, b=x)


def test_the_first_call_with_a_mask_of_another_length_is_told_so() -> None:
    compiled = compile(masked, PLAIN)
    check(compiled, {}, 5)
    with pytest.raises(errors.InvalidDynamicDims, match=r"x\.shape\[0\] = 5, mask\.shape\[0\] = 6"):
        compiled(torch.randn(5, 4), mask=torch.randn(6, 4))


def test_another_fixed_dimension_is_told_so_where_the_size_would_be_out_of_plan() -> None:
    model = torch.nn.Linear(33, 7).eval().requires_grad_(False)
    compiled = compile(model, Config(max_size=64, backend="eager", cache_dir=""))
    compiled(torch.randn(3, 33))
    with pytest.raises(errors.SizeOutOfPlan, match="expected dimension 1 to be 33") as e:
        compiled(torch.randn(3, 32))
    assert (
        str(e.value).splitlines()[1].startswith("where it may change as well: size 96 is outside")
    )
    allowed = Config(max_size=64, backend="eager", cache_dir="", on_out_of_plan="eager")
    either = compile(torch.nn.ReLU(), allowed)
    either(torch.randn(3, 33))
    assert either(torch.randn(3, 32)).shape == (3, 32)


def test_what_is_new_is_named_although_something_else_differed_more_often() -> None:
    compiled = compile(masked, Config(**{**vars(PLAIN), "max_signatures": 2}))
    check(compiled, {"scale": 0.25}, 5)
    check(compiled, {"scale": 0.5}, 5)
    with pytest.raises(errors.TooManySignatures, match=r"mask is None, now is float32"):
        compiled(torch.randn(5, 4), mask=torch.ones(5, 4), scale=0.5)
