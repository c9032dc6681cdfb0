"""Attention between pieces by range: found, replaced, chosen; right whatever is chosen."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import splitpoint
from splitpoint import Config, Range, errors, kernels
from splitpoint.capture.capture import capture
from splitpoint.capture.signature import Signature
from splitpoint.config import ATTENTION_OPS, ATTENTION_VARIANTS
from splitpoint.graph.pieces import CallOp, split
from splitpoint.kernels.attention import exceeded
from splitpoint.passes import attention
from splitpoint.passes.attention import VARIANTS, products
from splitpoint.tuning.attention import MOST_PRODUCTS, AttentionTuner, probes, typical_mask
from splitpoint.tuning.measure import Budget

NAMES = sorted(VARIANTS)
SIZES = (5, 1, 2, 8, 9, 33, 64)
F32, BF16 = torch.float32, torch.bfloat16


def heads(x, count, size):
    """[tokens, count * size] as [1, count, tokens, size], as a model lays it out."""
    return x[:, : count * size].view(1, -1, count, size).transpose(1, 2)


def attend(x, kv_heads=3, **options):
    if kv_heads != 3:
        options["enable_gqa"] = True
    query, key = heads(x, 3, 16), heads(x.cos(), kv_heads, 16)
    return F.scaled_dot_product_attention(query, key, heads(x.sin(), kv_heads, 16), **options)


def triangle(x):
    return torch.ones(x.shape[0], x.shape[0], dtype=torch.bool, device=x.device).tril()


def _longer_keys(x):
    key = heads(torch.cat([x, x.neg(), x[:1]]), 3, 16)
    return F.scaled_dot_product_attention(heads(x, 3, 16), key, key)


def _two_kinds(x):
    y = attend(x, is_causal=True).transpose(1, 2).reshape(-1, 48)
    return attend(torch.cat([y, x], -1)) + attend(y, is_causal=True)


FOUND = {
    "plain": (attend, ["3 heads of 16, size x size"]),
    "causal": (lambda x: attend(x, is_causal=True), ["3 heads of 16, size x size, causal"]),
    "scaled": (lambda x: attend(x, scale=0.3), ["3 heads of 16, size x size"]),
    "grouped": (lambda x: attend(x, kv_heads=1), ["3 heads over 1 of 16, size x size"]),
    "boolean": (
        lambda x: attend(x, attn_mask=triangle(x)),
        ["3 heads of 16, size x size, boolean mask"],
    ),
    "of one row": (
        lambda x: attend(x, attn_mask=(x[None, None, None, :, 0] > -1)),
        ["3 heads of 16, size x size, boolean mask"],
    ),
    "added": (
        lambda x: attend(x, attn_mask=torch.zeros_like(x[:, :1]).expand(-1, x.shape[0])),
        ["3 heads of 16, size x size, added mask"],
    ),
    "every row masked": (
        lambda x: attend(x, attn_mask=triangle(x) & (x[:, :1] > 0)),
        ["3 heads of 16, size x size, boolean mask"],
    ),
    "longer keys": (_longer_keys, ["3 heads of 16, size x (1 + 2*size)"]),
    "positional": (
        lambda x: F.scaled_dot_product_attention(
            heads(x, 3, 16), heads(x, 3, 16), heads(x, 3, 16), None, 0.0, True
        ),
        ["3 heads of 16, size x size, causal"],
    ),
    "two kinds": (
        _two_kinds,
        [f"3 heads of 16, size x size{causal}" for causal in (", causal", "", ", causal")],
    ),
    "contiguous": (
        lambda x: (
            F.scaled_dot_product_attention(*[heads(x, 3, 16).contiguous()] * 3)
            .transpose(1, 2)
            .reshape(-1, 48)
        ),
        ["3 heads of 16, size x size"],
    ),
    "dropout": (lambda x: attend(x, dropout_p=1.0), []),
    "negative scale": (lambda x: attend(x, scale=-1.0), []),
    "three dimensions": (
        lambda x: F.scaled_dot_product_attention(*[heads(x, 3, 16)[0]] * 3),
        [],
    ),
    "large heads": (
        lambda x: F.scaled_dot_product_attention(*[heads(x.repeat(1, 6), 1, 257)] * 3),
        [],
    ),
}


def split_of(function, x):
    with torch.no_grad():
        captured = capture(function, Signature(function, (x,), {}, {"x": 0}), (x.shape[0],))
        return split(captured.graph_module, ATTENTION_OPS, captured.symbols)


def config(name="rowwise", **more):
    named = {"1-64": name}
    return Config(max_size=64, split_points=[8], compile_sizes=[1], attention=named, **more)


def check(compiled, function, dtype=F32, sizes=SIZES):
    for size in sizes:
        x = torch.randn(size, 48).to(dtype)
        with torch.no_grad():
            expected = function(x)
        loose = 1e-4 if dtype == F32 else 3e-2
        torch.testing.assert_close(compiled(x), expected, rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", FOUND)
def test_what_is_found_and_that_it_stays_right(case, dtype):
    function, shapes = FOUND[case]
    steps = split_of(function, torch.randn(5, 48).to(dtype))
    assert [str(shape) for _, shape in attention.find(steps)] == shapes
    compiled = splitpoint.compile(function, config(backend="eager"))
    check(compiled, function, dtype, [5])
    # The eager backend is a reference and stays with torch's: the steps are replaced here.
    kernels.load()
    chosen = {shape: "rowwise" for _, shape in attention.find(steps)}
    made = attention.rewrite(steps, chosen)
    targets = [str(step.target) for step in made.steps if isinstance(step, CallOp)]
    assert targets.count("splitpoint.attention.default") == len(shapes)
    assert attention.rewrite(steps, {}).steps == steps.steps
    assert attention.rewrite(steps, dict.fromkeys(chosen, "torch")).steps == steps.steps


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grouped", "every row masked", "two kinds", "contiguous"])
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_right_in_every_range(case, name):
    function, shapes = FOUND[case]

    def model(x):  # with a piece before and one after it
        return function(x + 1).sin()

    compiled = splitpoint.compile(model, config(name))
    check(compiled, model, BF16)
    for entry in compiled.plan.entries:
        assert set(entry.attention.values()) == {name}
        assert len(entry.attention) == len(set(shapes))
    assert name in str(compiled.plan)
    assert splitpoint.Plan.from_json(compiled.plan.to_json()) == compiled.plan


def test_a_dtype_without_a_kernel_stays_with_torch():
    def function(x):
        return attend(x.double()).to(x.dtype)

    assert not VARIANTS["rowwise"].fits(one_shape(function))
    compiled = splitpoint.compile(function, config())
    check(compiled, function, sizes=[5])
    assert all(not entry.attention for entry in compiled.plan.entries)


def test_auto_measures_and_shows_its_choice():
    compiled = splitpoint.compile(attend, Config(max_size=16, compile_sizes=[1]))
    check(compiled, attend, sizes=[1, 16])
    tuner = compiled._program.choice.attention_tuner
    assert tuner.budget.spent_s > 0
    for entry in compiled.plan.entries:
        assert set(entry.attention.values()) <= {*VARIANTS, "torch"}
    # What was measured last is what the program chose by.
    for (shape, _), seconds in tuner._seconds.items():
        assert {"torch", "rowwise"} <= seconds.keys() <= {"torch", *VARIANTS}
        assert tuner.choose(shape, Range(1, 1)) in {"torch", "rowwise"}


@pytest.mark.parametrize(
    "more", [{"attention": "torch"}, {"linear_budget_s": 0}, {"splitting_ops": ()}]
)
def test_attention_stays_with_torch(more):
    compiled = splitpoint.compile(attend, Config(max_size=16, **more))
    check(compiled, attend, sizes=[1, 16])
    assert all(not entry.attention for entry in compiled.plan.entries)


def test_without_a_compiler_attention_stays_with_torch(monkeypatch, caplog):
    def fails():
        raise errors.KernelBuildError("there is no compiler")

    monkeypatch.setattr(kernels, "load", fails)
    with caplog.at_level(logging.WARNING, "splitpoint"):
        compiled = splitpoint.compile(attend, config())
        check(compiled, attend, sizes=[1, 16])
    assert all(not entry.attention for entry in compiled.plan.entries)
    assert caplog.text.count("attention with torch: there is no compiler") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("rowwise", "'auto', 'torch'"),
        ({"1-8": "packed"}, r"attention\['1-8'\] must be one of"),
        ({"8-1": "rowwise"}, "attention: Range"),
        (1, "attention must be 'auto', 'torch' or a dict"),
    ],
)
def test_config_refuses(value, said):
    with pytest.raises(errors.InvalidField, match=said):
        Config(attention=value)


def test_config_names_all_variants():
    assert set(ATTENTION_VARIANTS) == {"auto", "torch", *VARIANTS}
    given = Config(attention={"1-8": "rowwise", "9-64": "torch"})
    assert Config.from_json(given.to_json()) == given
    found = [given.attention_for(Range(a, b)) for a, b in ((1, 8), (2, 3), (9, 9), (8, 9))]
    assert found == ["rowwise", "rowwise", "torch", "auto"]


def one_shape(function=attend):
    ((_, shape),) = attention.find(split_of(function, torch.randn(5, 48)))
    return shape


@given(st.integers(1, 20000), st.integers(0, 8000))
def test_probes_lie_in_the_range(start, more):
    range_ = Range(start, start + more)
    sizes = probes(SHAPE, range_)
    assert sizes == sorted(set(sizes))
    if products(SHAPE, start) <= MOST_PRODUCTS:
        assert sizes[0] == start
        assert all(size in range_ for size in sizes)
    else:
        assert len(sizes) == 1
        assert start / 16 < sizes[0] < start
    assert all(products(SHAPE, size) <= MOST_PRODUCTS for size in sizes)


def test_no_probe_is_too_small_for_a_shape():
    less = one_shape(lambda x: F.scaled_dot_product_attention(*[heads(x[4:], 3, 16)] * 3))
    (size,) = probes(less, Range(9000, 9000))
    assert size < 9000
    assert products(less, size) <= MOST_PRODUCTS
    kept = dataclasses.replace(less, key=dataclasses.replace(less.key, shape=(1, 3, 10**9, 16)))
    (size,) = probes(kept, Range(10, 10))  # nothing smaller has a query
    assert size == 5


def test_a_wrong_variant_is_never_chosen_however_fast(monkeypatch):
    def nothing(query, *rest):
        return torch.zeros_like(query)

    wrong = dataclasses.replace(VARIANTS["rowwise"], name="wrong", call=lambda s: (nothing, {}))
    monkeypatch.setitem(VARIANTS, "wrong", wrong)
    kernels.load()
    tuner = AttentionTuner(1)
    assert tuner.choose(SHAPE, Range(1, 4)) != "wrong"
    assert tuner.seconds(SHAPE, 1, ["wrong"]) == {"wrong": float("inf")}


@pytest.mark.parametrize("dtype", [torch.bool, F32, BF16])
@pytest.mark.parametrize(
    ("shape", "strides", "shown"),
    [
        ((2, 1, 3, 5), (15, 15, 5, 1), 2 * (3 + 4 + 5)),
        ((2, 4, 5, 3), (0, 0, 3, 1), 8 * (0 + 0 + 1 + 2 + 3)),
        ((4, 3, 5), (0, 0, 1), 4 * 3 * 5),
        ((1, 1, 1, 5), (5, 5, 5, 1), 5),
        ((3, 4), (1, 3), 2 + 3 + 4),
    ],
)
def test_masks_that_are_timed_show_what_models_show(dtype, shape, strides, shown):
    mask = typical_mask(torch.empty_strided(shape, strides, dtype=dtype))
    assert (mask.shape, mask.stride(), mask.dtype) == (shape, strides, dtype)
    seen = mask if dtype == torch.bool else mask == 0
    assert int(seen.sum()) == shown
    assert bool(seen[..., -1, :].all())


def test_nothing_is_measured_twice_or_without_time():
    kernels.load()
    tuner = AttentionTuner(1)
    chosen = tuner.choose(SHAPE, Range(1, 8))
    spent = tuner.budget.spent_s
    assert spent > 0
    assert tuner.choose(SHAPE, Range(1, 8)) == chosen
    assert tuner.budget.spent_s == spent
    assert AttentionTuner(1, Budget(0)).choose(SHAPE, Range(1, 8)) == "torch"
    tuner = AttentionTuner(1)
    odd_heads = one_shape(lambda x: F.scaled_dot_product_attention(*[heads(x, 3, 12)] * 3))
    assert tuner.choose(odd_heads, Range(2000, 3000)) == "torch"
    assert tuner.budget.spent_s == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["grouped", "boolean", "longer keys"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_variants_against_float64(name, case, dtype):
    kernels.load()
    function, _ = FOUND[case]
    ((_, shape),) = attention.find(split_of(function, torch.randn(5, 48).to(dtype)))
    target, options = VARIANTS[name].call(shape)
    kinds = (shape.query, shape.key, shape.value)
    for size in (1, 7, 40):
        made = [torch.randn(kind.shape_at(size)).to(dtype) for kind in kinds]
        mask = None if shape.mask is None else torch.rand(shape.mask.shape_at(size)) < 0.5
        y = target(*made, mask, **options)
        blockwise = VARIANTS[name].blockwise
        worst = exceeded(y, *made, mask, shape.causal, scale=shape.scale, blockwise=blockwise)
        assert worst <= 1


SHAPE = one_shape()
