"""Functions over modules: what they reach is watched, and so is what leads there."""

from __future__ import annotations

import sys

import pytest
import torch

import splitpoint
from splitpoint import Config, errors
from splitpoint.capture.reached import can_follow, modules_of, reach_by, reach_tree
from splitpoint.capture.reads import Cells, Unwatchable
from splitpoint.capture.watch import watch

needs_tags = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="dicts have version tags in CPython 3.11 only"
)


class Block(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = torch.nn.Linear(4, 4)
        self.drop = torch.nn.Dropout(0.5)
        self.factor = 2.0

    def forward(self, x):
        return self.drop(self.inner(x)) * self.factor


class Other(Block):
    def forward(self, x):
        return self.inner(x) - 1


def made(seed: int = 0, kind: type[Block] = Block) -> Block:
    return kind(seed).eval().requires_grad_(False)


GLOBAL = made(1)


class Holder:
    def __init__(self, block: Block) -> None:
        self.block = block


class Closure:
    """A function over a module in a cell, one in a list, one of an object, a global one, and a
    tensor in a cell."""

    def __init__(self) -> None:
        block, blocks, held, shift = made(2), [made(3)], Holder(made(4)), torch.ones(4)

        def function(x):
            return GLOBAL(held.block(blocks[0](block(x)))) + shift

        self.function, self.blocks, self.held = function, blocks, held
        self.cells = Cells.of(function).cells

    @property
    def block(self) -> Block:
        return self.cells["block"].cell_contents


def rebind(name, value):
    return lambda c: setattr(c.cells[name], "cell_contents", value())


def parameter():
    return torch.nn.Parameter(torch.eye(4), requires_grad=False)


STILL_RIGHT = {
    "weights in place": lambda c: torch.nn.init.zeros_(c.block.inner.weight),
    "parameter replaced": lambda c: setattr(c.block.inner, "weight", parameter()),
    "data exchanged": lambda c: setattr(c.blocks[0].inner.weight, "data", torch.eye(4)),
    "submodule swapped": lambda c: setattr(c.block, "inner", made(7).inner),
    "cell rebound": rebind("block", lambda: made(8)),
    "element of a list replaced": lambda c: c.blocks.__setitem__(0, made(9)),
    "attribute of an object replaced": lambda c: setattr(c.held, "block", made(10)),
    "global rebound": lambda c: globals().update(GLOBAL=made(11)),
    "cell of a tensor rebound": rebind("shift", lambda: torch.zeros(4)),
    "tensor in a cell updated": lambda c: c.cells["shift"].cell_contents.zero_(),
    "attribute that nothing reads": lambda c: setattr(c.block, "note", 1),
}

REFUSED = {
    "attribute": lambda c: setattr(c.block, "factor", 3.0),
    "attribute of a global one": lambda c: setattr(GLOBAL, "factor", 3.0),
    "training": lambda c: c.block.train(),
    "training of a part": lambda c: c.held.block.drop.train(),
    "cell rebound to another kind": rebind("block", lambda: made(8, Other)),
    "submodule of another kind": lambda c: setattr(c.block, "inner", torch.nn.Identity()),
    "dtype": lambda c: c.blocks[0].double(),
    "forward of the class": lambda c: setattr(Block, "forward", Other.forward),
    "hook": lambda c: c.block.inner.register_forward_hook(lambda *_: None),
}


@pytest.fixture(autouse=True)
def _put_back(monkeypatch):
    monkeypatch.setitem(globals(), "GLOBAL", made(1))
    monkeypatch.setattr(Block, "forward", Block.forward)


def compiled_of(closure):
    compiled = splitpoint.compile(closure.function, Config(max_size=8, backend="eager"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), closure.function(x))
    return compiled, x


@pytest.mark.parametrize("name", STILL_RIGHT)
def test_what_a_function_reaches_is_followed(name):
    closure = Closure()
    compiled, x = compiled_of(closure)
    before = closure.function(x)
    STILL_RIGHT[name](closure)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), closure.function(x))
    assert compiled.stats().captures == 1
    assert torch.equal(before, closure.function(x)) == (name == "attribute that nothing reads")
    # What was put in the place is followed in its turn.
    closure.block.inner.weight.mul_(2)
    torch.testing.assert_close(compiled(x), closure.function(x))
    closure.block.factor = 5.0
    with pytest.raises(errors.StateChanged):
        compiled(x)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_is_wrong_for_is_refused(name):
    closure = Closure()
    compiled, x = compiled_of(closure)
    REFUSED[name](closure)
    for _ in range(2):
        with pytest.raises(errors.StateChanged):
            compiled(x)


@needs_tags
def test_dynamos_guards_are_not_asked_at_calls():
    closure = Closure()
    compiled, _ = compiled_of(closure)
    state = compiled._program.lanes[0].graph.state
    assert closure.block in state.reach().modules
    with torch.no_grad():
        assert state.watch.check()
        closure.block.factor = 3.0
        assert not state.watch.check()
        assert not state.check()
        assert state.rest._unwatched()  # what is left of Dynamo's knows nothing of the modules


def names_of_closure(closure):
    return {"F": Cells.of(closure.function), "G": globals()}


def test_ways_and_what_they_lead_to():
    closure = Closure()
    ways = ["F['block']", "F['blocks'][0]", "F['held'].block", "G['GLOBAL']", "F['shift']"]
    reached = reach_by(ways, lambda: names_of_closure(closure))()
    roots = [closure.block, closure.blocks[0], closure.held.block, GLOBAL]
    assert reached.modules == modules_of(roots)
    assert reached.holds([closure.block.inner.weight, closure.cells["shift"].cell_contents])
    assert not reached.holds([torch.ones(4)])


def test_a_way_behind_code_is_none():
    class Making:
        @property
        def block(self):
            return made()

    names = {"G": {"holder": Making()}}
    assert not can_follow("G['holder'].block", names)
    assert not can_follow("G['lacking']", names)
    with pytest.raises(Unwatchable):
        reach_by(["G['holder'].block"], lambda: names)()


@needs_tags
def test_a_watch_whose_way_is_gone_stays_stale():
    scope = {"block": made()}
    seen = watch(reach_by(["G['block']"], lambda: {"G": scope}), [scope["block"].inner.weight])
    assert seen.check()
    weight = scope.pop("block").inner.weight
    assert not seen.check()
    assert not seen.renew([weight], ())
    assert not seen.check()


def test_a_tree_needs_no_way():
    block = made()
    reached = reach_tree(block)()
    assert set(reached.modules) == {block, block.inner, block.drop}
    assert reached.holds(block.parameters())
    assert not reached.way.keyed
    assert not reached.way.objects
    assert reach_tree(None)().holds([])
