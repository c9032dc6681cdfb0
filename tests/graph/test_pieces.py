"""Splitting and fingerprints, on graphs as Dynamo captures them."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import splitpoint
from splitpoint import Config, errors
from splitpoint.capture.capture import capture
from splitpoint.capture.signature import Signature
from splitpoint.graph.pieces import CallOp, CallPiece, split
from splitpoint.graph.updates import writes

LIBRARY = torch.library.Library("splitpoint_test_pieces", "DEF")
LIBRARY.define("attention(Tensor q, Tensor(a!) cache) -> Tensor")
LIBRARY.define("pair(Tensor x) -> (Tensor, Tensor)")


def _attention(q, cache):
    cache[: q.shape[0]] += q
    return q * 2


LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
LIBRARY.impl("pair", lambda x: (x + 1, x.flip(0)), "CompositeExplicitAutograd")
torch.library.register_fake(
    "splitpoint_test_pieces::attention", lambda q, cache: torch.empty_like(q), lib=LIBRARY
)
torch.library.register_fake(
    "splitpoint_test_pieces::pair",
    lambda x: (torch.empty_like(x), torch.empty_like(x)),
    lib=LIBRARY,
)
OPS = torch.ops.splitpoint_test_pieces


def pieces_of(function, splitting_ops, *args):
    captured = capture(function, Signature(function, args, {}, {"x": 0}), (args[0].shape[0],))
    return split(captured.graph_module, splitting_ops, captured.symbols)


class Layers(torch.nn.Module):
    def __init__(self, count, constants=()):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(count))
        self.register_buffer("cache", torch.zeros(64, 4))
        self.constants = constants or [2.0] * count

    def forward(self, x):
        for layer, constant in zip(self.layers, self.constants, strict=True):
            x = F.relu(layer(x)) * constant
            x = OPS.attention(x, self.cache)
        return x


def test_equal_layers_are_one_unique_piece_whatever_their_names():
    found = pieces_of(Layers(6).forward, ["splitpoint_test_pieces::attention"], torch.randn(5, 4))
    assert found.piece_count == 6
    assert len(found.pieces) == 1
    kinds = [type(step) for step in found.steps]
    assert kinds == [CallPiece, CallOp] * 6


def test_a_different_constant_is_a_different_piece():
    module = Layers(4, [2.0, 2.0, 3.0, 2.0])
    found = pieces_of(module.forward, ["splitpoint_test_pieces::attention"], torch.randn(5, 4))
    assert found.piece_count == 4
    assert len(found.pieces) == 2


def test_without_splitting_ops_there_is_one_piece():
    found = pieces_of(Layers(3).forward, [], torch.randn(5, 4))
    assert found.piece_count == len(found.pieces) == len(found.steps) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 2,
        lambda x: x * 2.0,
        lambda x: x + 2,
        lambda x: x.to(torch.float64) * 2,
        lambda x: x[:, :2] * 2,
        lambda x: x[:, 1:3] * 2,
        lambda x: x.t() * 2,
        lambda x: x * x.shape[0],
        lambda x: torch.cat([x, x]) * 2,
        lambda x: F.gelu(x),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0, 5.0]),
    ],
)
def test_fingerprints_tell_functions_apart(change):
    others = SEEN.setdefault("fingerprints", {})
    (fingerprint,) = pieces_of(change, [], torch.randn(5, 4)).pieces
    (again,) = pieces_of(change, [], torch.randn(7, 4)).pieces
    assert fingerprint == again, "the example size must not matter"
    (twin,) = pieces_of(change, [], torch.randn(5, 4)).pieces
    assert fingerprint == twin
    assert others.setdefault(fingerprint, change) is change


SEEN: dict = {}


def test_fingerprints_tell_inputs_apart():
    def f(x):
        return x * 2

    inputs = [
        torch.randn(5, 4),
        torch.randn(5, 3),
        torch.randn(5, 4).double(),
        torch.randn(4, 5).t(),
        torch.randn(5, 4, 1),
    ]
    assert len({next(iter(pieces_of(f, [], x).pieces)) for x in inputs}) == len(inputs)


def test_fingerprints_are_the_same_in_another_process(tmp_path):
    import os
    import subprocess
    import sys

    script = tmp_path / "fingerprint.py"
    script.write_text(
        "import torch, splitpoint\n"
        "from splitpoint.capture.capture import capture\n"
        "from splitpoint.graph.pieces import split\n"
        "from splitpoint.capture.signature import Signature\n"
        "def f(x): return torch.nn.functional.gelu(x[:, 1:]) * 3\n"
        "c = capture(f, Signature(f, (torch.randn(5, 4),), {}, None), (5,))\n"
        "print(*split(c.graph_module, [], c.symbols).pieces)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().strip()


# --- results of split models -----------------------------------------------------------


def check(function, make, config, sizes=(5, 1, 8, 9, 64), **tolerance):
    compiled = splitpoint.compile(function, config, dynamic_dims={"x": 0})
    for size in sizes:
        args = make(size)
        torch.testing.assert_close(compiled(*args), function(*args), **tolerance)
    return compiled


def config(*ops, **more):
    return Config(max_size=64, split_points=[8], splitting_ops=ops, **more)


def test_a_splitting_op_that_writes_into_a_buffer_keeps_its_place():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(64, 4))
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = OPS.attention(self.linear(x) + self.cache.sum(), self.cache)
            x = torch.relu(x + self.cache.mean())
            return OPS.attention(self.linear(x), self.cache) + self.cache.sum()

    ours, theirs = Model().eval(), Model().eval()
    theirs.load_state_dict(ours.state_dict())
    compiled = splitpoint.compile(ours, config("splitpoint_test_pieces::attention"))
    for size in (5, 1, 9, 64):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x), theirs(x))
        torch.testing.assert_close(ours.cache, theirs.cache)


def test_a_splitting_op_with_two_results():
    def f(x):
        a, b = OPS.pair(x * 2)
        return a.sin() + b.cos()

    compiled = check(f, lambda n: (torch.randn(n, 4),), config("splitpoint_test_pieces::pair"))
    assert compiled.stats().pieces == 2


def test_tuples_and_sizes_do_not_cross_a_splitting_op():
    def f(x):
        a, b = (x * 2).chunk(2, -1)
        rows = x.shape[0] * 2
        c = OPS.pair(a)[0]
        return (c + b).view(rows, -1).sum(0) + rows

    check(f, lambda n: (torch.randn(n, 8),), config("splitpoint_test_pieces::pair"))


def test_an_update_in_place_of_memory_that_a_piece_sees_twice():
    def f(x):
        x = x * 2
        a, b = x.chunk(2, -1)
        c = OPS.pair(a)[0]
        a.add_(1)
        return b + c + x.sum()

    check(f, lambda n: (torch.randn(n, 8),), config("splitpoint_test_pieces::pair"))
    check(f, lambda n: (torch.randn(n, 8),), config())


def test_an_update_in_place_across_a_splitting_op():
    def f(x):
        x = x * 2
        c = OPS.pair(x)[0]
        x.add_(1)
        return x + c + OPS.pair(x)[1]

    check(f, lambda n: (torch.randn(n, 8),), config("splitpoint_test_pieces::pair"))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: x > 0, False),
        (lambda x: (x > 0) & (x < 1) | ~(x > 2), False),  # operator.and_, operator.or_
        (lambda x: x.relu_(), True),
        (lambda x: torch.relu_(x), True),
        (lambda x: torch.ops.aten.relu_(x), True),
        (lambda x: operator.iadd(x, 1), True),
        (lambda x: torch.sin(x, out=x), True),
        (lambda x: operator.iand(x > 0, x < 1), True),
    ],
)
def test_which_graphs_write_into_memory(call, expected):
    def f(x):
        call(y := x + 1)
        return y

    (piece,) = pieces_of(f, [], torch.randn(5, 4)).pieces.values()
    assert any(map(writes, piece.graph_module.graph.nodes)) == expected


def test_results_of_a_splitting_op_are_returned():
    def f(x):
        return OPS.pair(x)

    check(f, lambda n: (torch.randn(n, 4),), config("splitpoint_test_pieces::pair"))


@pytest.mark.parametrize("name", ["aten::mm", "aten::mm.default", "aten::matmul", "aten::linear"])
def test_aten_ops_by_name(name):
    weight = torch.randn(4, 4)
    functions = {
        "aten::mm": lambda x: torch.mm(x.sin(), weight).sin(),
        "aten::mm.default": lambda x: torch.mm(x.sin(), weight).sin(),
        "aten::matmul": lambda x: torch.matmul(x.sin(), weight).sin(),
        "aten::linear": lambda x: F.linear(x.sin(), weight).sin(),
    }
    compiled = check(functions[name], lambda n: (torch.randn(n, 4),), config(name))
    assert compiled.stats().pieces == 2


def heads(x):
    return [y.view(1, -1, 2, 4).transpose(1, 2) for y in x.chunk(3, -1)]


def test_scaled_dot_product_attention():
    def f(x):
        out = F.scaled_dot_product_attention(*heads(x.sin()), is_causal=True)
        return out.transpose(1, 2).reshape(-1, 8).sin()

    compiled = check(f, lambda n: (torch.randn(n, 24),), Config(max_size=64, split_points=[8]))
    assert compiled.stats().pieces == 2 * compiled.stats().captures


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention():
    def f(x):
        out = flex_attention(*heads(x.sin()), score_mod=lambda s, b, h, i, j: s + (i - j))
        return out.transpose(1, 2).reshape(-1, 8).sin()

    compiled = check(f, lambda n: (torch.randn(n, 24),), Config(max_size=64, split_points=[8]))
    assert compiled.stats().pieces == 2 * compiled.stats().captures


def test_intermediates_are_freed_after_their_last_use():
    import weakref

    seen = []

    def watch(x):
        seen.append(weakref.ref(x))
        alive = sum(ref() is not None for ref in seen[:-1])
        return x + alive

    library = torch.library.Library("splitpoint_test_pieces", "FRAGMENT")
    library.define("watch(Tensor x) -> Tensor")
    library.impl("watch", watch, "CompositeExplicitAutograd")
    torch.library.register_fake("splitpoint_test_pieces::watch", torch.empty_like, lib=library)

    def f(x):
        for _ in range(4):
            x = torch.ops.splitpoint_test_pieces.watch(x * 0 + 1)
        return x

    compiled = splitpoint.compile(f, config("splitpoint_test_pieces::watch"))
    with torch.inference_mode():
        assert float(compiled(torch.randn(5, 4)).max()) == 1.0
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["nowhere::op", "aten::no_such_op", "no_such_hop", "aten::mm.no"])
def test_unknown_names(name):
    with pytest.raises(errors.UnknownSplittingOp, match=name):
        pieces_of(lambda x: x * 2, [name], torch.randn(5, 4))
