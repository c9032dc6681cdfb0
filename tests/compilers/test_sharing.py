"""Ranges of which torch's answers are the same share a compile; others keep their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

import splitpoint
from splitpoint import Config
from splitpoint.compilers import inductor, stored
from splitpoint.errors import CompileError
from splitpoint.passes.base import Pass
from splitpoint.passes.noop import NoopElimination
from splitpoint.torch_internals.questions import can_be_noted

pytestmark = pytest.mark.skipif(
    not can_be_noted(), reason="this version of torch does not tell what a compile asks"
)
asks_for_size_one = pytest.mark.skipif(
    TorchVersion(torch.__version__) >= (2, 15),
    reason="torch 2.15 asks whether the size is 1: ranges that start above it have own compiles",
)

CONFIG = Config(max_size=64, split_points=[8, 32])
SIZES = (1, 7, 8, 9, 32, 33, 64)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(32, 48)
        self.norm = torch.nn.LayerNorm(48)

    def forward(self, x):
        return self.norm(F.silu(self.gate(x))).softmax(-1)


def mask(x):
    """Loops over the size in a type of 32 a register. Size 1 has a graph of its own, so that no
    range can tell more of the others' than that it is over 1."""
    if x.shape[0] == 1:
        return (x @ x.t()).to(torch.bfloat16).sigmoid() + 0
    return (x @ x.t()).to(torch.bfloat16).sigmoid() * 2


def first_sixteen(x):
    return x[:16] * 2


def scan(x):
    return x.cumsum(0) / torch.arange(1, x.shape[0] + 1)[:, None]


def chunked_sum(x):
    return x.sum(0)


CASES = {
    "layer": Layer(),
    "mask": mask,
    "first sixteen": first_sixteen,
    "scan": scan,
    "sum": chunked_sum,
    "gather": lambda x: x[torch.arange(x.shape[0]).flip(0)] + x.mean(),
}


@pytest.fixture
def compiles(monkeypatch):
    """What is compiled: (lines of the plan, what came of it)."""
    found: list[tuple[list[str], inductor.Compiled]] = []
    compile_piece = inductor.compile_piece

    def noted(piece, planned, passes, options=None, trusted=(), parts=()):
        made = compile_piece(piece, planned, passes, options, trusted, parts)
        found.append(([str(planned.range), *(str(part.range) for part in parts)], made))
        for part in parts:
            if part.range in made.serves:
                own = compile_piece(piece, part, passes, options, trusted)
                assert own.assumptions == made.assumptions
                assert [m.matches for m in own.matches] == [m.matches for m in made.matches]
                assert {k.source for k in own.waiting} == {k.source for k in made.waiting}
        return made

    monkeypatch.setattr(inductor, "compile_piece", noted)
    return found


@pytest.mark.parametrize("name", CASES)
def test_shared_code_is_what_each_range_would_be_given(name, compiles):
    """The kernels are compared in the fixture."""
    function = CASES[name]
    compiled = splitpoint.compile(function, CONFIG)
    for size in SIZES:
        x = torch.randn(size, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), function(x), rtol=2e-2, atol=2e-2)
    assert sum(compiled.stats().dispatches.values()) == len(SIZES)
    assert any(len(lines) > 1 for lines, _ in compiles)


@asks_for_size_one
def test_one_compile_serves_all_ranges_that_differ_in_nothing(compiles):
    compiled = splitpoint.compile(Layer().eval(), CONFIG)
    compiled(torch.randn(5, 32))
    assert [lines for lines, _ in compiles] == [["[1,64]", "[1,8]", "[9,32]", "[33,64]"]]
    assert [str(range_) for range_ in compiles[0][1].serves] == ["[1,8]", "[9,32]", "[33,64]"]
    (keys,) = {tuple(lane.artifacts.values()) for lane in compiled._program.lanes}
    assert len(keys) == 1
    assert compiled.stats().compilations == 3
    assert {str(m.range) for m in compiled.stats().matches} == {"[1,8]", "[9,32]", "[33,64]"}


def test_a_range_whose_bounds_answer_a_question_has_code_of_its_own(compiles):
    """`x[:16]` is all of `x` in [1,8] only, and in [17,64] as many rows at every size."""
    config = replace(CONFIG, split_points=[8, 16, 32])
    compiled = splitpoint.compile(first_sixteen, config)
    for size in (*SIZES, 15, 16, 17):
        x = torch.randn(size, 32)
        torch.testing.assert_close(compiled(x), first_sixteen(x))
    lines = [lines for lines, _ in compiles]
    assert ["[1,8]"] in lines
    assert ["[9,16]"] in lines
    assert not {"[1,8]", "[9,16]"} & set(map(str, compiles[0][1].serves))


def test_loops_written_for_the_hint_are_shared_with_equal_hints_only(compiles):
    compiled = splitpoint.compile(mask, CONFIG)
    compiled(torch.randn(5, 32))
    (served,) = [list(map(str, made.serves)) for lines, made in compiles if len(lines) > 1]
    assert served == ["[33,64]"]
    assert sorted(lines for lines, _ in compiles) == [
        *(["[1,1]"], ["[2,64]", "[2,8]", "[9,32]", "[33,64]"], ["[2,8]"], ["[9,32]"])
    ]


@asks_for_size_one
def test_ranges_whose_loops_threads_share_have_code_apart_from_others(compiles):
    torch.set_num_threads(2)
    splitpoint.compile(Layer().eval(), replace(CONFIG, linear="inductor"))(torch.randn(5, 32))
    assert [lines for lines, _ in compiles] == [["[1,64]", "[1,8]", "[9,32]", "[33,64]"], ["[1,8]"]]
    assert "omp" in "".join(kernel.source for kernel in compiles[0][1].waiting)


class Looks(NoopElimination):
    """Does the same, but may look at more."""

    asks_torch = False


def test_a_pass_that_may_look_at_bounds_sees_those_of_each_range(compiles):
    assert not Pass.asks_torch
    config = replace(CONFIG, passes=[Looks()])
    splitpoint.compile(Layer().eval(), config)(torch.randn(5, 32))
    assert [lines for lines, _ in compiles] == [["[1,8]"], ["[9,32]"], ["[33,64]"]]


def test_a_store_knows_whom_a_compile_serves(tmp_path: Path, monkeypatch):
    """Also where only the pieces are kept."""
    config = replace(CONFIG, cache_dir=str(tmp_path))
    layer = Layer().eval()
    first = splitpoint.compile(layer, config)
    x = torch.randn(40, 32)
    expected = first(x)
    for entry in (tmp_path / "models").rglob("*.json"):
        entry.unlink()
    monkeypatch.setattr(inductor, "compile_piece", None)  # is not called
    second = splitpoint.compile(layer, config)
    assert torch.equal(second(x), expected)
    assert (second.stats().compilations, second.stats().loads) == (0, 3)
    assert {name for lane in second._program.lanes for name in lane.artifacts.values()} == {
        name for lane in first._program.lanes for name in lane.artifacts.values()
    }


def test_what_serves_no_range_is_not_built(monkeypatch):
    """It was compiled in vain; that must not cost a C++ compile too."""
    compile_piece = inductor.compile_piece
    vain: list[inductor.Compiled] = []

    def serves_none(*args):
        made = compile_piece(*args)
        if args[-1]:
            made = replace(made, serves=())
            vain.append(made)
        return made

    monkeypatch.setattr(stored.inductor, "compile_piece", serves_none)
    x = torch.randn(5, 32)
    compiled = splitpoint.compile(lambda x: (x * 1.2345).sin(), CONFIG)
    torch.testing.assert_close(compiled(x), (x * 1.2345).sin())
    (made,) = vain
    # Of the same kernels those of the ranges are built.
    assert made.waiting
    assert all(kernel.function is None for kernel in made.waiting)


def test_ranges_that_cannot_be_compiled_as_one_are_compiled_one_by_one(monkeypatch):
    compile_piece = inductor.compile_piece

    def fails_for_all(*args):
        if args[-1]:
            raise CompileError("by design")
        return compile_piece(*args)

    monkeypatch.setattr(inductor, "compile_piece", fails_for_all)
    x = torch.randn(5, 32)
    compiled = splitpoint.compile(lambda x: x.cos() * 3, CONFIG)
    torch.testing.assert_close(compiled(x), x.cos() * 3)
    assert compiled.stats().compilations == 3
