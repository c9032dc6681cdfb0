"""That every change of what an expression reads is seen, and that nothing else is claimed."""

import importlib
import sys
import types

import pytest
import torch

import splitpoint
from splitpoint import Config, errors
from splitpoint.capture.facts import names_of
from splitpoint.capture.module_reads import ModuleReads
from splitpoint.capture.reached import ids_of, modules_of
from splitpoint.capture.reads import Cells, Reads
from splitpoint.capture.watch import PATIENCE, PAUSE, watch_reads

needs_tags = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="dicts have version tags in CPython 3.11 only"
)


class Base:
    kind = "base"


class Settings(Base):
    limit = 3

    def __init__(self):
        self.rate = 0.5
        self.names = ["a", "b"]
        self.table = {"x": 1}

    def method(self):
        return self.rate

    @property
    def half(self):
        return self.rate / 2


class Strange(Settings):
    """Looks attributes up in Python, as configurations of transformers do."""

    def __getattribute__(self, name):
        return super().__getattribute__("rate" if name == "speed" else name)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.settings = Settings()
        self.strange = Strange()

    def forward(self, x):
        return self.inner(x)


def function(x, scale=2.0):
    return x * scale


def other(x, scale=2.0):
    return x + scale


def make():
    """A model and names that expressions are evaluated with."""
    model = Model()
    cell = types.CellType(1.0)
    scope = {"flag": True, "helper": function, "kinds": Settings, "settings": Settings()}
    return {**names_of(model, Cells({"factor": cell}), scope), "B": {"len": len}}


CHANGES = {
    "G['flag']": lambda n: n["G"].update(flag=False),
    "G['flag'] is not None": lambda n: n["G"].pop("flag"),
    "G['helper']": lambda n: setattr(n["G"]["helper"], "__code__", other.__code__),
    "G['helper'].__defaults__": lambda n: setattr(n["G"]["helper"], "__defaults__", (3.0,)),
    "F['factor']": lambda n: setattr(n["F"].cells["factor"], "cell_contents", 2.0),
    "G['settings'].rate": lambda n: setattr(n["G"]["settings"], "rate", 1.0),
    "type(G['settings'])": lambda n: setattr(n["G"]["settings"], "__class__", Base),
    "G['settings'].limit": lambda n: setattr(n["G"]["kinds"], "limit", 4),
    "G['settings'].kind": lambda n: setattr(Base, "kind", "other"),
    "G['kinds'].limit": lambda n: setattr(n["G"]["settings"].__class__, "limit", 5),
    "G['settings'].method": lambda n: setattr(n["G"]["kinds"], "method", lambda self: 0),
    "G['settings'].names[0]": lambda n: n["G"]["settings"].names.__setitem__(0, "c"),
    "len(G['settings'].names)": lambda n: n["G"]["settings"].names.append("c"),
    "G['settings'].table['x']": lambda n: n["G"]["settings"].table.update(x=2),
    "'y' in G['settings'].table": lambda n: n["G"]["settings"].table.update(y=2),
    "tuple(G['settings'].table)": lambda n: n["G"]["settings"].table.update(y=2),
    "'new' in vars(G['settings'])": lambda n: setattr(n["G"]["settings"], "new", 1),
    "hasattr(G['settings'], 'lacking')": lambda n: setattr(n["G"]["kinds"], "lacking", 1),
    "self.settings.rate": lambda n: setattr(n["self"].settings, "rate", 1.0),
    "self.strange.rate": lambda n: setattr(n["self"].strange, "rate", 1.0),
    "len(self._modules['inner']._forward_hooks)": lambda n: n["self"].inner.register_forward_hook(
        lambda *_: None
    ),
    "dict(type(self.settings).__dict__)['limit']": lambda n: setattr(n["G"]["kinds"], "limit", 6),
    "type(self.settings).__mro__[1].kind": lambda n: setattr(Base, "kind", "third"),
    "B['len']": lambda n: n["B"].update(len=max),
}

BACK = {
    "limit": (Settings, 3),
    "method": (Settings, Settings.method),
    "kind": (Base, "base"),
    "__code__": (function, function.__code__),
    "__defaults__": (function, (2.0,)),
}


@pytest.fixture(autouse=True)
def _put_back():
    yield
    for name, (owner, value) in BACK.items():
        setattr(owner, name, value)
    if hasattr(Settings, "lacking"):
        del Settings.lacking


@needs_tags
@pytest.mark.parametrize("code", CHANGES)
def test_a_change_is_seen(code):
    names = make()
    reads = Reads(ids_of(modules_of([names["self"]])))
    assert reads.sees(code, names)
    check = watch_reads(reads)
    assert check()
    names["G"]["unrelated"] = 1  # a dict that changes elsewhere is looked at more closely
    names["G"]["settings"].unrelated = 1
    assert check()
    assert check()
    CHANGES[code](names)
    assert not check()


UNSEEN = {
    "a property": "self.settings.half",
    "what a look-up in Python makes of a name": "self.strange.speed",
    "a list as a value": "self.settings.names",
    "a dict as a value": "self.settings.table",
    "a key that is not there": "G['nothing']",
    "an attribute that is not there": "self.settings.nothing",
    "a comparison": "self.settings.rate > 1",
    "a call": "self.settings.method()",
    "a name without a meaning": "H['x']",
}


@pytest.mark.parametrize("what", UNSEEN)
def test_what_may_change_unseen_is_refused(what):
    assert not Reads().sees(UNSEEN[what], make())


OVER_M = (
    *("len(m._forward_hooks)", "len(m._forward_pre_hooks)", "type(m)", "m.settings.rate"),
    *("dict(type(m).__dict__)['forward']", "dict(type(m).__mro__[1].__dict__)['forward'].__code__"),
    *("type(m).__mro__[0].forward", "type(m).nothing", "m.settings.half", "G['settings'].kind"),
    *("len(self._modules['inner']._forward_hooks)", "type(m.settings)", "m is self"),
)


class Derived(Model):
    def forward(self, x):
        return super().forward(x) * 2


def places(reads):
    """What is noted, in no order."""
    keyed = {id(d): {k: id(v) for k, v in values.items()} for d, values in reads.keyed}
    elements = {(id(held), index) for held, index in reads.lists}
    return set(map(id, reads.whole)), keyed, set(map(id, reads.objects)), elements


def test_many_modules_are_read_at_once_as_they_are_one_by_one():
    names = make()
    modules = [names["self"], Model(), Model(), Derived(), Derived(), names["self"].inner]
    tree = ids_of(modules_of(modules[:4]))
    several, single = Reads(tree), Reads(tree)
    seen = {}
    for module in modules:
        inner = {**names, "m": module}
        found = ModuleReads.of(OVER_M).unseen(several, module, inner, seen)
        assert set(found) == {code for code in OVER_M if not single.sees(code, inner)}
    assert places(several) == places(single)
    assert places(several.way()) == places(single.way())


def test_a_module_without_hooks_of_its_own_is_refused():
    names = make()
    del vars(names["self"])["_forward_hooks"]
    codes = ["len(m._forward_hooks)", "len(m._forward_pre_hooks)"]
    inner = {**names, "m": names["self"]}
    assert "len(m._forward_hooks)" in ModuleReads.of(codes).unseen(Reads(), inner["m"], inner, {})


# --- in a compiled model ---------------------------------------------------------------

SOURCE = """
import torch

FACTOR = 2.0
TABLE = {"shift": 1.0}
STEPS = [1.0, 2.0]

def twice(x):
    return x * FACTOR

class Block(torch.nn.Module):
    offset = 0.5

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.scale = 0.5

    def forward(self, x):
        return twice(self.linear(x)) * self.scale + self.offset + TABLE["shift"] + STEPS[0]

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
"""

MODEL_CHANGES = {
    "global rebound": lambda s, m: setattr(s, "FACTOR", 3.0),
    "global mutated": lambda s, m: s.TABLE.update(shift=2.0),
    "global list mutated": lambda s, m: s.STEPS.__setitem__(0, 5.0),
    "function replaced": lambda s, m: setattr(s, "twice", lambda x: x),
    "function's code replaced": lambda s, m: setattr(
        s.twice, "__code__", (lambda x: x * 3).__code__
    ),
    "attribute": lambda s, m: setattr(m.blocks[1], "scale", 0.25),
    "class attribute": lambda s, m: setattr(s.Block, "offset", 1.5),
    "hook": lambda s, m: m.blocks[0].linear.register_forward_hook(lambda *_: _[2] * 2),
    "method of one": lambda s, m: setattr(m.blocks[0], "forward", lambda x: x),
    "torch state": lambda s, m: torch.set_num_threads(2),
}

FOLLOWED = {
    "parameter replaced": lambda s, m: setattr(
        m.blocks[0].linear, "weight", torch.nn.Parameter(torch.randn(4, 4), False)
    ),
    "parameter updated": lambda s, m: m.blocks[0].linear.weight.mul_(2),
    "data": lambda s, m: setattr(m.blocks[0].linear.weight, "data", torch.randn(4, 4)),
    "module replaced": lambda s, m: m.blocks.__setitem__(1, s.Block().eval().requires_grad_(False)),
    "unrelated global": lambda s, m: setattr(s, "OTHER", 1),
    "unrelated class attribute": lambda s, m: setattr(s.Block, "unrelated", 1),
}


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "read_model.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("read_model", None)
    yield importlib.import_module("read_model")
    sys.modules.pop("read_model", None)


def build(source):
    torch.manual_seed(0)
    return source.Model().eval().requires_grad_(False)


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("kernel", ["inductor", "packed"])
def test_changes_of_a_compiled_model(source, tmp_path, start, kernel):
    """All in one: each change on a model of its own, after a change that was followed."""
    folder = str(tmp_path / "kept") if start == "warm" else ""
    config = Config(max_size=4, linear={"1-4": kernel}, cache_dir=folder)
    x = torch.randn(3, 4)
    if start == "warm":
        splitpoint.compile(build(source), config)(x)
    for name, change in {**FOLLOWED, **MODEL_CHANGES}.items():
        source = importlib.reload(source)
        model = build(source)
        compiled = splitpoint.compile(model, config)
        torch.testing.assert_close(compiled(x), model(x))
        assert start == "cold" or compiled.stats().loads == 1
        with torch.no_grad():
            change(source, model)
        if name in FOLLOWED:
            for _ in range(2):
                torch.testing.assert_close(compiled(x), model(x), msg=name)
            # What was replaced is watched from then on.
            hook = model.blocks[1].linear.register_forward_hook(lambda *_: _[2] * 2)
            with pytest.raises(errors.StateChanged):
                compiled(x)
            hook.remove()
            torch.testing.assert_close(compiled(x), model(x), msg=name)
            model.blocks[1].scale = 0.75
        with pytest.raises(errors.StateChanged):
            compiled(x)
        torch.set_num_threads(1)


@needs_tags
def test_a_place_that_changes_while_the_facts_hold(source):
    """Facts are then looked at themselves: no error, and no change of theirs goes unseen."""
    config = Config(max_size=4, linear="inductor", cache_dir="")
    model = build(source)
    compiled = splitpoint.compile(model, config)
    x = torch.randn(3, 4)
    compiled(x)
    rest = compiled._program.lanes[0].graph.state.rest
    for calls in range(2 * PATIENCE):
        source.FACTOR = float("2.0")  # another object of the same value
        torch.testing.assert_close(compiled(x), model(x))
        assert (rest._way is None) is (calls + 1 >= PATIENCE)
        factor, source.FACTOR = source.FACTOR, 3.0
        with pytest.raises(errors.StateChanged):
            compiled(x)
        source.FACTOR = factor
    for _ in range(PAUSE):  # it has come to rest, and is watched again
        torch.testing.assert_close(compiled(x), model(x))
    assert rest._way is not None
    source.FACTOR = 3.0
    with pytest.raises(errors.StateChanged):
        compiled(x)


def test_a_closure_after_a_warm_start(tmp_path):
    factor = 2.0

    def scaled(x):
        return x * factor

    config = Config(max_size=4, cache_dir=str(tmp_path / "kept"))
    x = torch.ones(3)
    for loads in (0, 1):
        compiled = splitpoint.compile(scaled, config)
        torch.testing.assert_close(compiled(x), x * 2)
        assert compiled.stats().loads == loads
    factor = 3.0
    with pytest.raises(errors.StateChanged):
        compiled(x)
