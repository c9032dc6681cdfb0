import pytest
import torch
from torch.torch_version import TorchVersion

import splitpoint
from splitpoint import Config, Range, errors
from splitpoint.passes.noop import NoopElimination


class Recorder(splitpoint.Pass):
    """Records what a pass sees; a new one in each test, so that no cache hides it."""

    def __init__(self, applies=lambda range_: True, tag=""):
        self.applies, self.tag, self.seen = applies, tag, []

    def applies_to(self, range):
        return self.applies(range)

    def uuid(self):
        return f"{id(self)}"

    def __call__(self, graph):
        symbols = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            for n in value.shape if isinstance(value, torch.Tensor) else ():
                if isinstance(n, torch.SymInt):
                    expr = n.node.expr
                    for symbol in expr.free_symbols:
                        symbols[symbol] = n.node.shape_env.var_to_range[symbol]
        self.seen.append((splitpoint.current_range(), dict(symbols)))
        return 3


LIBRARY = torch.library.Library("splitpoint_test_passes", "DEF")
LIBRARY.define("attention(Tensor x) -> Tensor")
LIBRARY.impl("attention", lambda x: x.flip(0), "CompositeExplicitAutograd")
torch.library.register_fake("splitpoint_test_passes::attention", torch.empty_like, lib=LIBRARY)


class Toy(torch.nn.Module):
    """A splitting op between two equal pieces."""

    def __init__(self):
        super().__init__()
        self.before = torch.nn.Linear(16, 16)
        self.after = torch.nn.Linear(16, 16)

    def forward(self, x):
        x = torch.ops.splitpoint_test_passes.attention(self.before(x).sin())
        return self.after(x).sin()


@pytest.mark.usefixtures("fresh_inductor_cache")
def test_a_pass_sees_each_range_once_for_two_equal_pieces():
    seen = Recorder()
    config = Config(
        max_size=8192,
        split_points=[8, 32],
        compile_sizes=[16, 64, 128],
        splitting_ops=["splitpoint_test_passes::attention"],
        passes=[seen],
    )
    toy = Toy().eval()
    compiled = splitpoint.compile(toy, config)
    for size in (1, 2, 8, 9, 16, 31, 32, 33, 64, 128, 129, 8192):
        x = torch.randn(size, 16)
        torch.testing.assert_close(compiled(x), toy(x))
    stats = compiled.stats()
    assert (stats.captures, stats.pieces, stats.unique_pieces) == (1, 2, 1)
    assert stats.compilations == 6
    assert [str(range_) for range_, _ in seen.seen] == [
        *("[1,8]", "[16,16]", "[9,32]", "[64,64]", "[128,128]", "[33,8192]"),
    ]
    for range_, symbols in seen.seen:
        if range_.is_single_size:
            assert symbols == {}
        else:
            (interval,) = symbols.values()
            assert (interval.lower, interval.upper) == (range_.start, range_.end)


@pytest.mark.usefixtures("fresh_inductor_cache")
def test_matches_are_counted_by_pass_piece_and_range():
    every, small = Recorder(), Recorder(lambda range_: range_.end <= 8)
    compiled = splitpoint.compile(
        lambda x: x.sin(), Config(max_size=64, split_points=[8], passes=[every, small])
    )
    compiled(torch.randn(5, 4))
    counts = [(str(m.range), m.matches) for m in compiled.stats().matches]
    assert counts == [("[1,8]", 3), ("[1,8]", 3), ("[9,64]", 3)]
    assert [e.passes for e in compiled.plan.entries] == [("Recorder", "Recorder"), ("Recorder",)]


def test_current_range_outside_a_pass():
    with pytest.raises(errors.NotCompiling):
        splitpoint.current_range()


class Failing(Recorder):
    def __call__(self, graph):
        raise ZeroDivisionError("by design")


class Countless(Recorder):
    def __call__(self, graph):
        return None


class Breaking(Recorder):
    def __call__(self, graph):
        *_, last = graph.nodes
        last.args = ((torch.fx.Node(graph, "ghost", "call_function", torch.sin, (), {}),),)
        return 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Failing, "ZeroDivisionError: by design"),
        (Countless, "number of matches"),
        (Breaking, "fail"),
    ],
)
@pytest.mark.usefixtures("fresh_inductor_cache")
def test_a_pass_that_fails_is_named_with_its_range(kind, said):
    compiled = splitpoint.compile(lambda x: x.sin() * 5, Config(max_size=8, passes=[kind()]))
    with pytest.raises(errors.PassError, match=said) as caught:
        compiled(torch.randn(3, 4))
    assert kind.__name__ in str(caught.value)
    assert "[1,8]" in str(caught.value)


class Narrowing(Recorder):
    """Branches on the size in Python, which puts a guard into the range's ShapeEnv."""

    def uuid(self):
        return f"narrowing {self.tag}"

    def __call__(self, graph):
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and isinstance(value.shape[0], torch.SymInt):
                return int(bool(value.shape[0] > 40))
        return 0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.usefixtures("fresh_inductor_cache")
def test_a_graph_valid_for_a_part_of_its_range_splits_it(cached):
    for _ in range(1 + cached):  # the second time Inductor's cache brings graph and guard
        torch._dynamo.reset()
        compiled = splitpoint.compile(
            lambda x: x.cos() + 2,
            Config(max_size=64, split_points=[8], passes=[Narrowing(tag="a")]),
        )
        for size in (1, 8, 9, 40, 41, 64):
            x = torch.randn(size, 4)
            torch.testing.assert_close(compiled(x), x.cos() + 2)
        assert [str(r) for r in compiled.plan.ranges] == ["[1,8]", "[9,40]", "[41,64]"]
        assert "split from [9,64]: size >" in compiled.plan.entries[1].note


@pytest.mark.usefixtures("fresh_inductor_cache")
def test_on_guard_error_names_the_guard_and_the_mend():
    compiled = splitpoint.compile(
        lambda x: x.cos() + 3, Config(max_size=64, on_guard="error", passes=[Narrowing(tag="b")])
    )
    with pytest.raises(errors.GuardError, match=r"size > 40.*split point at 40"):
        compiled(torch.randn(3, 4))


@pytest.mark.usefixtures("fresh_inductor_cache")
@pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 13),
    reason="a bare aten.slice has a size of its own when torch 2.11 traces it",
)
def test_noop_elimination_depends_on_the_range():
    def f(x):
        return torch.ops.aten.slice.Tensor(x, 0, 0, 8) * 2

    slices: dict[str, int] = {}

    class Left(splitpoint.Pass):
        """Counts the slices that are left; some versions of torch remove them before."""

        def __call__(self, graph):
            slices[str(splitpoint.current_range())] = sum(
                "slice" in str(node.target) for node in graph.nodes
            )
            return 0

    passes = [NoopElimination(), Left()]
    compiled = splitpoint.compile(f, Config(max_size=64, split_points=[8], passes=passes))
    for size in (1, 7, 8, 9, 64):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x), f(x))
    assert slices == {"[1,8]": 0, "[9,64]": 1}
    matches = {str(m.range): m.matches for m in compiled.stats().matches}
    assert matches["[9,64]"] == 0


NOOPS = {
    "slice": lambda x: x[:, :16] + 1,
    "view": lambda x: x.view(x.shape) + 1,
    "cast": lambda x: x.to(torch.float32) + 1,
    "expand": lambda x: x.expand(x.shape) + 1,
    "slice that cuts": lambda x: x[:, 1:] + 1,
    "reversed": lambda x: x[:, ::2] + 1,
    "transposed back": lambda x: x.t().t() + 1,
    "returned": lambda x: (x.view(x.shape), x + 1),
}


@pytest.mark.parametrize("name", NOOPS)
def test_noop_elimination_changes_no_result(name):
    f = NOOPS[name]
    plain = splitpoint.compile(f, Config(max_size=64, passes=[]))
    with_pass = splitpoint.compile(f, Config(max_size=64, passes=[NoopElimination()]))
    for size in (1, 5, 64):
        x = torch.randn(size, 16)
        torch.testing.assert_close(with_pass(x), f(x))
        torch.testing.assert_close(with_pass(x), plain(x))


def test_uuids_tell_passes_and_settings_apart():
    class A(splitpoint.Pass):
        def __init__(self, n=1):
            self.n = n

        def settings(self):
            return {"n": self.n}

    class B(A):
        pass

    assert A(1).uuid() == A(1).uuid()
    assert len({A(1).uuid(), A(2).uuid(), B(1).uuid(), NoopElimination().uuid()}) == 4


def test_range_is_a_value():
    assert Range(1, 8) == Range(1, 8)
    assert len({Range(1, 8), Range(1, 8), Range(1, 9)}) == 2


class Talkative(splitpoint.Pass):
    """Says what it did; one is equal to the other, so that a cache serves it."""

    runs = 0

    def __call__(self, graph):
        Talkative.runs += 1
        return splitpoint.passes.base.Found(2, ("left: one",), ("taken: two",))


@pytest.mark.usefixtures("fresh_inductor_cache")
def test_what_a_pass_said_survives_inductors_cache():
    said = []
    for _ in range(2):
        torch._dynamo.reset()
        config = Config(max_size=16, passes=[Talkative()], linear="inductor")
        compiled = splitpoint.compile(lambda x: x.sin() * 2, config)
        compiled(torch.randn(5, 4))
        said += [(m.matches, m.notes, m.chosen) for m in compiled.stats().matches]
    assert said == [(2, ("left: one",), ("taken: two",))] * 2
    assert Talkative.runs == 1, "the second compile did not take the graph from the cache"
    assert compiled.plan.entries[0].collectives == ("taken: two",)
    assert "Talkative: left: one" in str(compiled.stats())
