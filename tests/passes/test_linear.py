"""Linear layers by range: found, rewritten, packed, chosen; right whatever is chosen."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import splitpoint
from splitpoint import Config, Range, errors, kernels
from splitpoint.capture.capture import capture
from splitpoint.capture.signature import Signature
from splitpoint.capture.sources import Bound
from splitpoint.graph.pieces import split
from splitpoint.kernels.bounds import ROUNDOFF, bounds
from splitpoint.kernels.layout import quantize
from splitpoint.kernels.reference import ACTIVATIONS
from splitpoint.kernels.reference import linear as exact_linear
from splitpoint.passes import linear
from splitpoint.passes.linear import LAYOUTS, VARIANTS, Layers, layout_of
from splitpoint.passes.linear_sites import LinearShape, find
from splitpoint.runtime.packed_weights import PackedWeights
from splitpoint.tuning.linear import LinearTuner, probes

PLAIN = LinearShape((264,), 200, torch.float32)
NAMES = sorted(
    name
    for name, each in VARIANTS.items()
    if not each.weights and not each.batch_invariant and each.fits(PLAIN)
)


class Model(torch.nn.Module):
    """Two layers of one shape, one of another with a bias, and a weight used in two ways."""

    def __init__(self, k=200, n=264):
        super().__init__()
        self.a = torch.nn.Linear(k, n, bias=False)
        self.b = torch.nn.Linear(k, n, bias=False)
        self.down = torch.nn.Linear(n, k)

    def forward(self, x):
        y = F.silu(self.a(x)) * self.b(x)
        return x + self.down(y) + self.a.weight.sum()


def config(name, **more):
    return Config(max_size=64, split_points=[8], compile_sizes=[1], linear={"1-64": name}, **more)


def check(compiled, model, make, sizes=(5, 1, 2, 8, 9, 33, 64)):
    for size in sizes:
        x = make(size)
        with torch.no_grad():
            expected = model(x)
        if x.dtype == torch.float32:
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        else:  # bf16 rounds to 2**-9 after every operation here, compiled code less often
            torch.testing.assert_close(compiled(x), expected, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_right_in_every_range(name, dtype):
    model = Model().to(dtype).eval()
    compiled = splitpoint.compile(model, config(name))
    check(compiled, model, lambda size: torch.randn(size, 200, dtype=dtype))
    assert all(set(entry.linear.values()) == {name} for entry in compiled.plan.entries)
    assert name in str(compiled.plan)
    packs = VARIANTS[name].layout != "plain"
    assert (compiled.stats().packed_bytes > 0) == packs


@pytest.mark.parametrize("name", NAMES)
def test_more_than_two_dimensions(name):
    model = Model().eval()
    compiled = splitpoint.compile(model, config(name), dynamic_dims={"x": 1})
    check(compiled, model, lambda size: torch.randn(1, size, 200))
    check(
        splitpoint.compile(model, config(name), dynamic_dims={"x": 0}),
        model,
        lambda size: torch.randn(size, 3, 200),
    )


def _in_place(model):
    with torch.no_grad():
        model.a.weight.mul_(2)


def _data(model):
    model.a.weight.data = torch.randn(264, 200)


def _replaced(model):
    model.a.weight = torch.nn.Parameter(torch.randn(264, 200))


def _loaded(model):
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})


def _bias(model):
    with torch.no_grad():
        model.down.bias.add_(3)


@pytest.mark.parametrize("change", [_in_place, _data, _replaced, _loaded, _bias])
@pytest.mark.parametrize("name", ["packed", "onednn"])
def test_packed_copies_follow_their_weights(name, change):
    model = Model().eval()
    compiled = splitpoint.compile(model, config(name))
    check(compiled, model, lambda size: torch.randn(size, 200), [5, 1, 64])
    before = compiled.stats().packed_bytes
    change(model)
    check(compiled, model, lambda size: torch.randn(size, 200), [5, 1, 64, 5])
    assert compiled.stats().packed_bytes == before


def test_in_place_updates_are_followed_without_module_guards_too():
    model = Model().eval()
    compiled = splitpoint.compile(model, config("packed", module_guards="first_call"))
    check(compiled, model, lambda size: torch.randn(size, 200), [5])
    _in_place(model)
    check(compiled, model, lambda size: torch.randn(size, 200), [5, 9])


def test_one_copy_serves_all_ranges_and_layers_keep_their_own():
    model = Model().eval()
    compiled = splitpoint.compile(model, config("packed"))
    check(compiled, model, lambda size: torch.randn(size, 200), [5, 1, 64])
    shapes = [
        LinearShape((264, 264), 200, torch.float32),
        LinearShape((200,), 264, torch.float32),
    ]
    sizes = [size for shape in shapes for size in linear.nbytes(shape, "packed")]
    assert len(sizes) == 3
    assert compiled.stats().packed_bytes == sum(sizes)


def test_max_packed_bytes():
    model = Model().eval()
    (one,) = linear.nbytes(LinearShape((200,), 264, torch.float32), "packed")
    compiled = splitpoint.compile(model, config("packed", max_packed_bytes=one))
    check(compiled, model, lambda size: torch.randn(size, 200), [5, 1, 64])
    assert 0 < compiled.stats().packed_bytes <= one
    none = splitpoint.compile(model, config("packed", max_packed_bytes=0))
    check(none, model, lambda size: torch.randn(size, 200), [5])
    assert none.stats().packed_bytes == 0


def test_inductor_leaves_everything_as_it_is():
    model = Model().eval()
    compiled = splitpoint.compile(model, Config(max_size=64, linear="inductor"))
    check(compiled, model, lambda size: torch.randn(size, 200), [5])
    assert compiled.stats().packed_bytes == 0
    assert all(not entry.linear for entry in compiled.plan.entries)


def test_a_weight_that_the_module_does_not_hold_is_not_packed():
    def f(x, weight):
        return F.linear(x, weight)

    compiled = splitpoint.compile(f, config("packed"), dynamic_dims={"x": 0})
    for size in (5, 9):
        x, weight = torch.randn(size, 200), torch.randn(264, 200)
        torch.testing.assert_close(compiled(x, weight), f(x, weight), rtol=1e-4, atol=1e-4)
    assert compiled.stats().packed_bytes == 0


def test_auto_measures_within_its_budget_and_shows_its_choice():
    model = Model(512, 768).to(torch.bfloat16).eval()
    compiled = splitpoint.compile(model, Config(max_size=64, split_points=[8], compile_sizes=[1]))
    check(compiled, model, lambda size: torch.randn(size, 512, dtype=torch.bfloat16), [5, 1, 64])
    tuner = compiled._program.choice.linear_tuner
    assert tuner.budget.spent_s > 0
    for entry in compiled.plan.entries:
        assert set(entry.linear.values()) <= {*VARIANTS, "inductor"}
    again = splitpoint.Plan.from_json(compiled.plan.to_json())
    assert again == compiled.plan


def test_without_time_to_measure_layers_stay_with_inductor():
    model = Model(512, 768).eval()
    compiled = splitpoint.compile(model, Config(max_size=64, linear_budget_s=0))
    check(compiled, model, lambda size: torch.randn(size, 512), [5])
    assert compiled.stats().packed_bytes == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("fast", "'auto', 'inductor'"),
        ({"1-8": "fast"}, r"linear\['1-8'\] must be one of"),
        ({"8-1": "packed"}, "linear: Range"),
        ([1], "linear must be"),
    ],
)
def test_config_refuses(value, said):
    with pytest.raises(errors.InvalidField, match=said):
        Config(linear=value)


def test_config_names_all_variants():
    from splitpoint.config import LINEAR_VARIANTS

    assert set(LINEAR_VARIANTS) == {"auto", "autotuned", "inductor", *NAMES}
    mapping = Config(linear={"1-8": "packed"})
    assert Config.from_json(mapping.to_json()) == mapping
    assert mapping.linear_for(Range(2, 8)) == "packed"
    assert mapping.linear_for(Range(1, 9)) == "auto"


# --- parts -----------------------------------------------------------------------------


def piece_of(model, x):
    """The one piece of a model, its inputs' values, and which of them the module holds."""
    captured = capture(model, Signature(model.forward, (x,), {}, None), (x.shape[0],))
    whole = split(captured.graph_module, [], captured.symbols)
    (piece,), (step,) = whole.pieces.values(), whole.steps
    sources = dict(zip(whole.inputs, captured.inputs, strict=True))
    held = captured.state.fetch()
    values = [
        held[source.index] if isinstance(source := sources[name], Bound) else x
        for name in step.inputs
    ]
    return piece, values, frozenset(i for i, value in enumerate(values) if value is not x)


def test_rewriting_keeps_pieces_equal_and_inputs_few():
    piece, _, bound = piece_of(Model().eval(), torch.randn(5, 200))
    sites = find(piece, bound)
    assert [str(site.shape) for site in sites] == ["200->silu(264)*264", "264->200 +residual"]
    assert find(piece, frozenset()) == []
    chosen = {site.shape: "packed" for site in sites}
    prepared = linear.rewrite(piece, bound, chosen)
    layouts = sorted(layout for _, layout in prepared.sources)
    # The weight that is also summed stays an input in its own layout beside its packed copy.
    assert layouts == ["packed"] * 3 + ["plain"] * 3
    assert prepared.piece.fingerprint != piece.fingerprint
    assert linear.rewrite(piece, bound, chosen).piece.fingerprint == prepared.piece.fingerprint
    assert len(piece.graph_module.graph.find_nodes(op="placeholder")) == len(piece.values) + 1
    assert linear.rewrite(piece, bound, {}).piece is piece


class Layered(torch.nn.Module):
    """A function of x [size, 64] and the two linear layers and the matrices given to it."""

    def __init__(self, function):
        super().__init__()
        self.a = torch.nn.Linear(64, 64, bias=False)
        self.b = torch.nn.Linear(64, 64, bias=False)
        self.biased = torch.nn.Linear(64, 64)
        self.turned = torch.nn.Parameter(torch.randn(64, 96) / 8)
        self.shift = torch.nn.Parameter(torch.randn(96))
        values, scale = quantize(torch.randn(96, 64) / 8)
        self.register_buffer("int8", values)
        self.register_buffer("scale", scale)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def _view_between(m, x):
    return m.a(x).view(-1, 8, 8) * m.b(x).view(-1, 8, 8)


def _written_between(m, x):
    x = x + 1
    a = m.a(x)
    x.mul_(2)
    return a * m.b(x)


FOUND = {
    "one": (lambda m, x: m.a(x), ["64->64"]),
    "same input": (lambda m, x: m.a(x).cos() + m.b(x).sin(), ["64->64+64"]),
    "not alike": (lambda m, x: m.a(x).cos() + m.biased(x).sin(), ["64->64", "64->64"]),
    "other input": (lambda m, x: m.b(m.a(x).cos()), ["64->64", "64->64"]),
    "silu gate": (lambda m, x: F.silu(m.a(x)) * m.b(x), ["64->silu(64)*64"]),
    "gate right": (lambda m, x: m.b(x) * F.silu(m.a(x)), ["64->silu(64)*64"]),
    "gelu gate": (
        lambda m, x: F.gelu(m.a(x), approximate="tanh") * m.b(x),
        ["64->gelu_tanh(64)*64"],
    ),
    "plain gate": (lambda m, x: m.a(x) * m.b(x), ["64->64*64"]),
    "both active": (lambda m, x: F.silu(m.a(x)) * F.silu(m.b(x)), ["64->silu(64)", "64->silu(64)"]),
    "square": (lambda m, x: m.a(x).square() + (y := m.b(x)) * y, ["64->64+64"]),
    "gate needed twice": (
        lambda m, x: F.silu(y := m.a(x)) * m.b(x) + y,
        ["64->64+64"],
    ),
    "activation": (lambda m, x: F.gelu(m.biased(x)), ["64->gelu(64)"]),
    "unknown activation": (lambda m, x: F.relu(m.biased(x)), ["64->64"]),
    "residual": (lambda m, x: x + m.biased(x), ["64->64 +residual"]),
    "residual left": (lambda m, x: m.biased(x) + x, ["64->64 +residual"]),
    "broadcast": (lambda m, x: m.a(x) + x[:1], ["64->64"]),
    "two sums": (lambda m, x: m.a(x) + m.biased(x), ["64->64", "64->64 +residual"]),
    "scalar": (lambda m, x: m.a(x) + 1, ["64->64"]),
    "gated residual": (
        lambda m, x: x + F.silu(m.a(x)) * m.b(x),
        ["64->silu(64)*64 +residual"],
    ),
    "view between": (_view_between, ["64->64+64"]),
    "masked": (lambda m, x: m.a(x).cos() + m.b(x) * ((x > 0) & (x < 1) | (x > 2)), ["64->64+64"]),
    "written between": (_written_between, ["64->64", "64->64"]),
    "addmm": (lambda m, x: torch.addmm(m.shift, x, m.turned), ["64->96"]),
    "scaled addmm": (lambda m, x: torch.addmm(m.shift, x, m.turned, beta=2), []),
    "mm": (lambda m, x: x.mm(m.turned), ["64->96"]),
    "matmul": (lambda m, x: x @ m.turned, ["64->96"]),
    "transposed": (
        lambda m, x: x @ m.a.weight.t() + F.linear(x, m.turned.T).sum(),
        ["64->64", "64->96"],
    ),
    "int8": (lambda m, x: F.linear(x, m.int8.to(x.dtype)) * m.scale, ["64->96"]),
    "int8 unscaled": (lambda m, x: F.linear(x, m.int8.to(x.dtype)), []),
}


@pytest.mark.parametrize("name", ["gemv", "packed", "onednn"])
@pytest.mark.parametrize("case", FOUND)
def test_what_is_found_and_that_it_stays_right(case, name):
    function, shapes = FOUND[case]
    model, x = Layered(function).eval(), torch.randn(5, 64)
    piece, values, bound = piece_of(model, x)
    sites = find(piece, bound)
    assert [str(site.shape) for site in sites] == shapes
    chosen = {s.shape: name for s in sites if VARIANTS[name].fits(s.shape)}
    kernels.load()
    prepared = linear.rewrite(piece, bound, chosen)
    expected = model(x.clone())
    inputs = [LAYOUTS[layout].pack(values[i].detach()) for i, layout in prepared.sources]
    if piece.takes:
        inputs.insert(0, 5)
    with torch.no_grad():
        (made,) = prepared.piece.graph_module(*inputs)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_packed_weights_pack_once_and_drop_what_is_gone():
    weights = PackedWeights()
    a, b = torch.randn(64, 32), torch.randn(64, 32)
    packed = weights.get(a, "packed")
    assert weights.get(a, "packed") is packed
    weights.get(b, "packed")
    assert weights.nbytes == 2 * packed.nbytes
    assert weights.fresh()
    a.add_(1)
    assert not weights.fresh()
    weights.repack()
    assert weights.fresh()
    torch.testing.assert_close(packed, LAYOUTS["packed"].pack(a))
    weights.retain([b])
    assert weights.nbytes == packed.nbytes
    assert weights.fresh()


SHAPE = LinearShape((512,), 256, torch.float32)


@given(st.integers(1, 4000), st.integers(0, 4000), st.integers(1, 9000), st.integers(1, 9000))
def test_probes_lie_in_the_range(start, more, n, k):
    range_ = Range(start, start + more)
    sizes = probes(LinearShape((n,), k, torch.float32), range_)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == start
    assert all(size in range_ for size in sizes)


def test_a_wrong_variant_is_never_chosen_however_fast(monkeypatch):
    wrong = dataclasses.replace(
        VARIANTS["packed"],
        name="wrong",
        layout="plain",
        promises=lambda range_: True,
        run=lambda x, layers: [x.new_zeros(x.shape[0], n) for n in layers.shape.outputs],
    )
    monkeypatch.setitem(VARIANTS, "wrong", wrong)
    splitpoint.kernels.load()
    tuner = LinearTuner(threads=1)
    assert tuner.choose(SHAPE, Range(1, 4)) != "wrong"
    assert tuner.seconds(SHAPE, 1, ["wrong"])["wrong"] == float("inf")


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tokens=st.integers(1, 40),
    columns=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    k=st.integers(1, 90),
    flags=st.tuples(*[st.booleans()] * 5),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    threads=st.sampled_from([1, 2]),
)
def test_variants_against_float64(name, dtype, tokens, columns, k, flags, activation, threads):
    kernels.load()
    bias, gated, residual, transposed, int8 = flags
    columns = columns[:1] * 2 if gated else columns
    shape = LinearShape(
        tuple(columns),
        k,
        dtype,
        bias,
        activation,
        gated,
        residual and (gated or len(columns) == 1),
        transposed,
        int8,
    )
    variant = VARIANTS[name]
    if not variant.fits(shape):
        return
    matrices, scales = [torch.randn(n, k).to(dtype) for n in columns], []
    if int8:
        matrices, scales = map(list, zip(*map(quantize, matrices), strict=True))
    held = [matrix.t().contiguous() if transposed else matrix for matrix in matrices]
    layers = Layers(
        shape,
        [LAYOUTS[layout_of(variant, shape)].pack(weight) for weight in held],
        scales,
        [torch.randn(n).to(dtype) for n in columns] if bias else [],
        torch.randn(tokens, columns[0]).to(dtype) if shape.residual else None,
    )
    x = torch.randn(tokens, k).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    made = variant.run(x, layers)
    torch.set_num_threads(before)
    rest = (scales, layers.biases, layers.residual, activation, gated)
    products = [p.abs() for p in exact_linear(x, matrices, scales, layers.biases)]
    for index, (y, exact, allowed) in enumerate(
        zip(made, exact_linear(x, matrices, *rest), bounds(x, matrices, *rest), strict=True)
    ):
        if not variant.fuses:
            # Each step that follows rounds to the dtype, of values no larger than these.
            largest = (products[0] + 1) * (products[1] + 1) if gated else products[index] + 1
            if layers.residual is not None:
                largest = largest + layers.residual.double().abs()
            allowed = allowed + 6 * ROUNDOFF[dtype] * largest
        assert bool(((y.double() - exact).abs() <= allowed).all())


def test_the_rows_of_a_layer_need_not_be_the_size():
    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(64, 64, bias=False)
            self.b = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.b(self.a(x)[-1:].cos())

    piece, _, bound = piece_of(Last().eval(), torch.randn(5, 64))
    first, last = (site.shape for site in find(piece, bound))
    assert first.rows_in(Range(3, 9)) == Range(3, 9)
    assert last.rows_in(Range(3, 9)) == Range(1, 1)
    assert str(last) == "64->64 of 1 rows"
    assert dataclasses.replace(first, rows="4*size").rows_in(Range(3, 9)) == Range(12, 36)
