"""Linear layers by range: found, rewritten, packed, chosen; right whatever is chosen."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import splitpoint
from splitpoint import Config, Range, errors
from splitpoint.graph.capture import capture
from splitpoint.graph.pieces import split
from splitpoint.graph.signature import Signature
from splitpoint.packing import PackedWeights
from splitpoint.passes import linear
from splitpoint.passes.linear import LAYOUTS, VARIANTS, LinearShape
from splitpoint.tuning.linear import LinearTuner, probes

NAMES = sorted(VARIANTS)


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
        LinearShape(264, 200, torch.float32, False),
        LinearShape(264, 200, torch.float32, False),
        LinearShape(200, 264, torch.float32, True),
    ]
    assert compiled.stats().packed_bytes == sum(linear.nbytes(s, "packed") for s in shapes)


def test_max_packed_bytes():
    model = Model().eval()
    one = linear.nbytes(LinearShape(200, 264, torch.float32, True), "packed")
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
    tuner = compiled._program.tuner
    assert tuner.spent_s > 0
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

    assert set(LINEAR_VARIANTS) == {"auto", "inductor", *VARIANTS}
    mapping = Config(linear={"1-8": "packed"})
    assert Config.from_json(mapping.to_json()) == mapping
    assert mapping.linear_for(Range(2, 8)) == "packed"
    assert mapping.linear_for(Range(1, 9)) == "auto"


# --- parts -----------------------------------------------------------------------------


def test_rewriting_keeps_pieces_equal_and_inputs_few():
    model = Model().eval()
    captured = capture(model, Signature(model.forward, (torch.randn(5, 200),), {}, None), 5)
    (piece,) = split(captured.graph_module, [], captured.symbols).pieces.values()
    bound = frozenset(range(1, len(piece.values)))
    sites = linear.find(piece, bound)
    assert [str(site.shape) for site in sites] == ["200->264", "200->264", "264->200"]
    assert linear.find(piece, frozenset()) == []
    chosen = {site.shape: "packed" for site in sites}
    prepared = linear.rewrite(piece, bound, chosen)
    layouts = sorted(layout for _, layout in prepared.sources)
    # The weight that is also summed stays an input in its own layout beside its packed copy.
    assert layouts == ["packed"] * 3 + ["plain"] * 3
    assert prepared.piece.fingerprint != piece.fingerprint
    assert linear.rewrite(piece, bound, chosen).piece.fingerprint == prepared.piece.fingerprint
    assert len(piece.graph_module.graph.find_nodes(op="placeholder")) == len(piece.values) + 1
    assert linear.rewrite(piece, bound, {}).piece is piece


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


SHAPE = LinearShape(512, 256, torch.float32, False)


@given(st.integers(1, 4000), st.integers(0, 4000), st.integers(1, 9000), st.integers(1, 9000))
def test_probes_lie_in_the_range(start, more, n, k):
    range_ = Range(start, start + more)
    sizes = probes(LinearShape(n, k, torch.float32, False), range_)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == start
    assert all(size in range_ for size in sizes)


def test_a_wrong_variant_is_never_chosen_however_fast(monkeypatch):
    import dataclasses

    wrong = dataclasses.replace(
        VARIANTS["packed"],
        name="wrong",
        layout="plain",
        admits=lambda shape, range_: True,
        run=lambda x, w, s, b: x.new_zeros(x.shape[0], s.n),
    )
    monkeypatch.setitem(VARIANTS, "wrong", wrong)
    splitpoint.kernels.load()
    tuner = LinearTuner(threads=1)
    assert tuner.choose(SHAPE, Range(1, 4)) != "wrong"
    assert tuner.seconds(SHAPE, 1, ["wrong"])["wrong"] == float("inf")


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(1, 90),
    st.booleans(),
)
def test_variants_against_float64(name, dtype, tokens, n, k, has_bias):
    splitpoint.kernels.load()
    variant = VARIANTS[name]
    shape = LinearShape(n, k, dtype, has_bias)
    weight = torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    x = torch.randn(tokens, k).to(dtype)
    y = variant.run(x, LAYOUTS[variant.layout].pack(weight), shape, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().t() + 10
    # fp32 sums in any order: (k + 4) 2**-24 of the sum of magnitudes; then one rounding. oneDNN
    # rounds bf16 once more before it adds the bias.
    roundoff = torch.finfo(dtype).eps / 2
    allowed = (k + 4) * 2.0**-24 * magnitude + 2.02 * roundoff * (exact.abs() + magnitude * 0)
    if has_bias:
        allowed += roundoff * (exact - bias.double()).abs()
    assert bool(((y.double() - exact).abs() <= allowed).all())
