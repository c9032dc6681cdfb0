from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

import splitpoint
from splitpoint import Config, errors
from splitpoint.collectives.policy import Entry, Interval, Key, Policy
from splitpoint.passes.allreduce_rmsnorm import AllReduceRMSNorm

from .groups import one_rank

HIDDEN, EPS = 64, 1e-5
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with one_rank(tmp_path_factory.mktemp("group")) as made:
        yield made


def reduce(x):
    return funcol.all_reduce(x, "sum", "0")


# --- forms of RMSNorm, as models write them --------------------------------------------


def llama(z, w):
    x = z.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return w * x.to(z.dtype)


def gemma(z, w):
    x = z.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return (x * (1.0 + w.float())).type_as(z)


def gemma3(z, w):
    x = z.float()
    x = x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5)
    return (x * (1.0 + w.float())).type_as(z)


def functional(z, w):
    return F.rms_norm(z, (HIDDEN,), w, EPS)


def fused(z, w):
    return torch.ops.aten._fused_rms_norm(z, [HIDDEN], w, EPS)[0]


def by_square_root(z, w):
    x = z.float()
    return (w.float() * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS))).to(z.dtype)


def reciprocal_root(z, w):
    x = z.float()
    return (x.square().mean(-1, keepdim=True).add(EPS).sqrt().reciprocal() * x).to(z.dtype) * w


def weightless(z, w):
    return F.rms_norm(z, (HIDDEN,), None, EPS)


def expanded(z, w):
    return llama(z, w.unsqueeze(0))


def in_bf16(z, w):  # 1 + w rounds before it multiplies
    return llama(z, 1 + w)


NORMS = [
    *(llama, gemma, gemma3, functional, fused),
    *(by_square_root, reciprocal_root, weightless, expanded, in_bf16),
]


# --- quantisations ---------------------------------------------------------------------


def fp8_static(h, s):
    return (h.float() / s).clamp(-448, 448).to(FP8)


def fp8_by_inverse(h, s):
    return torch.clamp(h.to(torch.float32) * s, min=-448, max=448).to(FP8)


def fp8_token(h, s):
    h = h.float()
    scale = (h.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return (h / scale).clamp(-448, 448).to(FP8), scale


def fp8_token_by_inverse(h, s):
    h = h.float()
    scale = h.abs().amax(dim=-1, keepdim=True) * (1 / 448)
    return (h * scale.reciprocal()).clamp(-448, 448).to(FP8), scale


def fp8_token_as_vllm(h, s):
    largest, _ = h.abs().max(dim=-1)
    scale = (largest.unsqueeze(-1).to(torch.float32) / 448).clamp(min=1 / (448 * 512))
    return (h.float() * scale.reciprocal()).clamp(-448, 448).to(FP8), scale


def fp8_token_up(h, s):  # by how much values are multiplied, as torchao has it
    up = 448 / h.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (h.float() * up).clamp(-448, 448).to(FP8), up.reciprocal()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def packed(codes):
    codes = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return codes[..., 0] | (codes[..., 1] << 4)


def nvfp4(h, s):
    """Scales and values as kernels for NVIDIA have them, codes by comparisons."""
    blocks = h.float().unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1) / 6 * s).clamp(max=448).to(FP8)
    scaled = blocks * (s / scales.float()).unsqueeze(-1)
    size = scaled.abs()
    codes = (size > 0.25).int() + (size >= 0.75) + (size > 1.25) + (size >= 1.75)
    codes = codes + (size > 2.5) + (size >= 3.5) + (size > 5.0) + 8 * (scaled < 0)
    return packed(codes.flatten(-2)), scales


def nvfp4_by_bits(h, s):
    """As torchao: the scale of the tensor divides, and e2m1 is made of the bits of fp32."""
    blocks = h.float().reshape(h.shape[0], -1, 16)
    scales = ((blocks.abs().amax(-1) / 6).float() / s).clamp(2**-6, 448).to(FP8)
    scaled = (blocks / (s * scales.float()).unsqueeze(-1)).clamp(-6, 6).reshape(h.shape)
    sign = (scaled.view(torch.int32) >> 31) & 8
    size = scaled.abs()
    # Adding 2^22 * 1.5 rounds to a multiple of the last place, here of 0.5; normals by their bits.
    subnormal = (size * 2 + 12582912.0).view(torch.int32) & 3
    bits = size.view(torch.int32)
    odd = (bits >> 22) & 1
    normal = ((bits + (0x1FFFFF + odd) - (126 << 23)) >> 22) & 7
    codes = torch.where(size < 1, subnormal, normal) | sign
    return packed(codes.reshape(h.shape)), scales


# --- running ---------------------------------------------------------------------------


@dataclass
class Ran:
    outputs: tuple[Any, ...]
    expected: tuple[Any, ...]
    matches: int
    notes: tuple[str, ...]
    operators: list[Any] = field(default_factory=list)


class Operators(splitpoint.Pass):
    """What is called in the graph after the pass under test."""

    def __init__(self):
        self.nodes = []

    def uuid(self):
        return f"{id(self)} {torch.rand(1)}"

    def __call__(self, graph):
        self.nodes += [n for n in graph.nodes if n.op == "call_function"]
        return 0

    def fused(self):
        return [n for n in self.nodes if "splitpoint.allreduce_rmsnorm" in str(n.target)]


def settings(node):
    """What a fused operator is given besides tensors, whichever form it has."""
    if node.target == torch.ops.splitpoint.allreduce_rmsnorm.both:
        group, eps, weight_bias, algorithm = node.args[3:]
        wanted = {"quant": "none", "want_norm": True, "want_residual": True}
        named = {"group": group, "eps": eps, "weight_bias": weight_bias, "algorithm": algorithm}
        return named | wanted
    return node.kwargs


def run(
    function,
    dtype=torch.bfloat16,
    given=None,
    shape=(5, HIDDEN),
    residual=None,
    scale=None,
    **config,
):
    """Compile f(x, residual, weight, scale) with the pass, and run it and the eager one."""
    x, r = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=residual or dtype)
    w, s = torch.rand(HIDDEN, dtype=dtype) + 0.5, torch.tensor(0.02) if scale is None else scale
    seen = Operators()
    config = {"max_size": 64, **config}
    used = given or AllReduceRMSNorm(algorithm="reference")
    dims = {"x": len(shape) - 2, "r": len(shape) - 2}
    compiled = splitpoint.compile(
        lambda x, r: function(x, r, w, s), Config(passes=[used, seen], **config), dynamic_dims=dims
    )
    outputs = compiled(x, r)
    expected = function(x, r, w, s)
    as_tuple = lambda v: v if isinstance(v, tuple) else (v,)
    first = compiled.stats().matches[0]
    ran = Ran(as_tuple(outputs), as_tuple(expected), first.matches, first.notes, seen.fused())
    ran.compiled, ran.all, ran.dtype = compiled, seen.nodes, dtype
    return ran


def near(ran):
    """Whether outputs are those of eager up to rounding: one unit of the coarsest dtype."""
    exact = ran.dtype == torch.float32
    for a, b in zip(ran.outputs, ran.expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == FP8:
            # A norm that rounds the other way in bf16 may land on the next code.
            a, b = a.float(), b.float()
            assert ((a - b).abs() <= 2**-3 * b.abs() + 2**-9).all()
        elif a.dtype == torch.uint8:
            # Nor may it there, and where that is the largest of a block its scale moves too.
            a, b = (E2M1[torch.stack([v & 15, v >> 4]).int() & 7] for v in (a, b))
            off = (a - b).abs()
            assert (off <= 2).all()
            assert (off > 0).float().mean() < 0.1
        else:
            torch.testing.assert_close(
                a, b, rtol=1e-4 if exact else 2e-2, atol=1e-5 if exact else 1e-2
            )


@pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_form_of_rmsnorm_matches_once_with_its_weight_and_eps(norm, dtype):
    def forward(x, r, w, s):
        z = r + reduce(x)
        return norm(z, w), z

    ran = run(forward, dtype)
    assert (ran.matches, ran.notes) == (1, ())
    (node,) = ran.operators
    assert settings(node)["eps"] == pytest.approx(EPS)
    assert settings(node)["weight_bias"] == (
        1.0 if norm in (gemma, gemma3) or (norm is in_bf16 and dtype == torch.float32) else 0.0
    )
    left = {str(n.target) for n in ran.all}
    assert not any("all_reduce" in name or "rsqrt" in name or "mean" in name for name in left)
    near(ran)


QUANTS = {
    "fp8_static": (fp8_static, fp8_by_inverse),
    "fp8_token": (fp8_token, fp8_token_by_inverse, fp8_token_as_vllm, fp8_token_up),
    "nvfp4": (nvfp4, nvfp4_by_bits),
}
SCALES = {fp8_static: 0.02, fp8_by_inverse: 50.0, nvfp4: 448 * 6 / 5.0, nvfp4_by_bits: 5 / 448 / 6}


@pytest.mark.parametrize(
    ("name", "quant"),
    [(name, quant) for name, quants in QUANTS.items() for quant in quants],
    ids=lambda v: getattr(v, "__name__", None),
)
@pytest.mark.parametrize("norm", [llama, functional], ids=lambda f: f.__name__)
def test_every_quantisation_matches_alone_and_beside_the_norm(name, quant, norm):
    given = torch.tensor(SCALES.get(quant, 1.0))
    for beside in (False, True):

        def forward(x, r, w, s, beside=beside):
            z = reduce(x) + r
            h = norm(z, w)
            quantised = quant(h, s)
            quantised = quantised if isinstance(quantised, tuple) else (quantised,)
            return (*quantised, z, *([h.tanh()] if beside else []))

        ran = run(forward, scale=given)
        assert (ran.matches, ran.notes) == (1, ())
        (node,) = ran.operators
        assert settings(node)["quant"] == name
        assert settings(node)["want_norm"] is beside
        assert settings(node)["want_residual"] is True
        left = {str(n.target) for n in ran.all}
        assert not any(step in target for target in left for step in ("amax", "clamp", "abs"))
        near(ran)


def test_without_residual_and_with_a_dead_one():
    ran = run(lambda x, r, w, s: llama(reduce(x), w))
    assert (ran.matches, ran.operators[0].args[1]) == (1, None)
    assert settings(ran.operators[0])["want_residual"] is False
    near(ran)

    def first_layer(x, r, w, s):
        z = reduce(x)
        return llama(z, w), z

    ran = run(first_layer)
    assert (ran.matches, settings(ran.operators[0])["want_residual"]) == (1, True)
    near(ran)
    ran = run(lambda x, r, w, s: functional(reduce(x) + r, w))
    assert (ran.matches, settings(ran.operators[0])["want_residual"]) == (1, False)
    near(ran)


def test_a_residual_in_fp32_stays_in_fp32():
    def forward(x, r, w, s):
        z = r + reduce(x).float()
        return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * w, z

    ran = run(forward, residual=torch.float32)
    assert ran.matches == 1
    assert ran.outputs[1].dtype == torch.float32
    near(ran)

    # Added in fp32 but kept in bf16: the operator returns what is kept.
    def vllm(x, r, w, s):
        z = reduce(x).float() + r.float()
        h = (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * w
        return h, z.to(x.dtype)

    ran = run(vllm)
    assert ran.matches == 1
    assert ran.operators[0].args[1].op == "placeholder", "no cast of the residual is left"
    near(ran)

    # Kept in fp32 although the residual came in bf16.
    def wide(x, r, w, s):
        z = reduce(x).float() + r.float()
        return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * w, z

    ran = run(wide)
    assert ran.matches == 1
    near(ran)


def test_views_between_the_steps_and_a_batch_dimension():
    def forward(x, r, w, s):
        z = r + reduce(x.view(-1, HIDDEN)).view(x.shape)
        return llama(z, w), z

    ran = run(forward, shape=(1, 5, HIDDEN))
    assert ran.matches == 1
    near(ran)

    def after(x, r, w, s):
        h = functional(r + reduce(x), w)
        return h.view(-1, 2, HIDDEN // 2).tanh(), h

    ran = run(after, shape=(1, 5, HIDDEN))
    assert ran.matches == 1
    near(ran)


def test_a_chain_of_layers_passes_the_residual_on():
    def forward(x, r, w, s):
        for norm in (llama, functional, gemma):
            r = r + reduce(x)
            x = norm(r, w).tanh()
        return functional(r + reduce(x), w)

    ran = run(forward)
    assert (ran.matches, ran.notes) == (4, ())
    assert [settings(node)["want_residual"] for node in ran.operators] == [True] * 3 + [False]
    near(ran)


def test_static_sizes_and_ranges():
    def forward(x, r, w, s):
        z = r + reduce(x)
        return llama(z, w), z

    ran = run(forward, compile_sizes=[1, 5], split_points=[8])
    for size in (1, 2, 5, 8, 9, 64):
        x, r = torch.randn(size, HIDDEN).bfloat16(), torch.randn(size, HIDDEN).bfloat16()
        assert ran.compiled(x, r)[0].shape == (size, HIDDEN)
    counts = [m.matches for m in ran.compiled.stats().matches if m.name == "AllReduceRMSNorm"]
    assert counts == [1, 1, 1, 1]


# --- custom operators ------------------------------------------------------------------

LIBRARY = torch.library.Library("vllm", "FRAGMENT")
LIBRARY.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
LIBRARY.impl("all_reduce", lambda x, name: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("vllm::all_reduce", lambda x, name: torch.empty_like(x), lib=LIBRARY)


def test_an_all_reduce_that_is_a_named_operator():
    def forward(x, r, w, s):
        z = torch.ops.vllm.all_reduce(x, group_name="0") + r
        return functional(z, w), z

    ran = run(forward)
    assert ran.matches == 1
    assert settings(ran.operators[0])["group"] == "0"
    near(ran)


# --- near misses -----------------------------------------------------------------------


def other_users(x, r, w, s):
    a = reduce(x)
    z = a + r
    return llama(z, w), z, a.sin()


def mean_over_tokens(x, r, w, s):
    z = (reduce(x) + r).float()
    return z * torch.rsqrt(z.pow(2).mean(0, keepdim=True) + EPS) * w


def layer_norm(x, r, w, s):
    return F.layer_norm(reduce(x) + r, (HIDDEN,), w)


def no_eps(x, r, w, s):
    z = (reduce(x) + r).float()
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True)) * w


def shared_variance(x, r, w, s):
    z = (reduce(x) + r).float()
    variance = z.pow(2).mean(-1, keepdim=True)
    return (z * torch.rsqrt(variance + EPS)).to(x.dtype) * w, variance


def wide_norm(x, r, w, s):
    z = (reduce(x) + r).float()
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS) * w


def before_the_weight(x, r, w, s):
    z = (reduce(x) + r).float()
    n = (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return n * w, n


def maximum(x, r, w, s):
    return llama(funcol.all_reduce(x, "max", "0") + r, w)


def ends(x, r, w, s):
    return reduce(x)


def scaled_residual(x, r, w, s):
    return llama(torch.add(reduce(x), r, alpha=2), w)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (other_users, "result is used besides the residual add: aten::sin"),
        (mean_over_tokens, "expected a mean over the last dimension, kept, found aten::mean.dim"),
        (layer_norm, "after the residual add expected one square"),
        (no_eps, "expected the add of a constant (eps), found aten::rsqrt"),
        (shared_variance, "has other users than"),
        (wide_norm, "the norm is used in torch.float32"),
        (before_the_weight, "the norm before its weight has other users: the end of the piece"),
        (maximum, "it reduces by 'max', not 'sum'"),
        (ends, "expected one square (of an RMSNorm), found the end of the piece"),
        (scaled_residual, "expected one square (of an RMSNorm), found aten::add.Tensor"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_near_miss_is_left_alone_and_says_why(function, said):
    ran = run(function)
    assert (ran.matches, ran.operators) == (0, [])
    (note,) = ran.notes
    assert note.startswith("all_reduce is left alone: ")
    assert said in note
    assert note in str(ran.compiled.stats())
    near(ran)


def test_one_token_is_not_taken_for_a_weight():
    def gate(x, r, w, s):
        z = r + reduce(x)
        y = z.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * x, z

    ran = run(gate, shape=(1, HIDDEN), max_size=1)
    assert ran.matches == 1
    assert "full" in str(ran.operators[0].args[2]), "the norm has no weight"
    near(ran)


def narrow(h, s):
    return (h.float() / s).clamp(-400, 400).to(FP8)


def unclamped_and_halved(h, s):
    return (h.float() / s * 0.5).to(FP8)


def constant_scale(h, s):
    return (h.float() / 0.02).clamp(-448, 448).to(FP8)


def scale_of_the_tensor(h, s):
    h = h.float()
    return (h / (h.abs().amax() / 448)).clamp(-448, 448).to(FP8)


def two_scales(h, s):
    return (h.float() / s / s.exp()).clamp(-448, 448).to(FP8)


def blocks_of_32(h, s):
    blocks = h.float().unflatten(-1, (-1, 32))
    scales = (blocks.abs().amax(-1) / 6 * s).clamp(max=448).to(FP8)
    scaled = (blocks * (s / scales.float()).unsqueeze(-1)).abs()
    codes = sum((scaled > bound).int() for bound in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    return packed(codes.flatten(-2)), scales


def magnitudes(h, s):  # without the signs
    blocks = h.float().unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1) / 6 * s).clamp(max=448).to(FP8)
    scaled = (blocks * (s / scales.float()).unsqueeze(-1)).abs()
    codes = sum((scaled > bound).int() for bound in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    return packed(codes.flatten(-2)), scales


def scales_used_otherwise(h, s):
    h = h.float()
    largest = h.abs().amax(-1, keepdim=True)
    return (h * (448 / largest)).clamp(-448, 448).to(FP8), (largest / 448).log(), largest / 448


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        (narrow, "is not fp8_static: of the values that were tried"),
        (unclamped_and_halved, "is not fp8_static: of the values that were tried"),
        (constant_scale, "is not fp8_static, which takes a scale: none is given"),
        (scale_of_the_tensor, "is not fp8_token: of the values that were tried"),
        (two_scales, "is not fp8_static: of the values that were tried"),
        (blocks_of_32, "is not nvfp4: of the values that were tried"),
        (magnitudes, "is not nvfp4: of the values that were tried"),
        (scales_used_otherwise, "aten::amax (amax) has other users"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_quantisation_that_the_operator_does_not_have_is_left_behind_with_a_note(quant, said):
    def forward(x, r, w, s):
        return quant(llama(reduce(x) + r, w), s)

    ran = run(forward, shape=(8, HIDDEN))
    assert ran.matches == 1
    assert settings(ran.operators[0])["quant"] == "none"
    (note,) = ran.notes
    assert note.startswith("all_reduce: its quantisation is left alone: ")
    assert said in note
    near(ran)


# --- the policy ------------------------------------------------------------------------


def test_settings_survive_the_json_of_a_configuration():
    policy = Policy(
        (
            Entry(
                Key("cpu", 1),
                (Interval(1024, "one_shot"), Interval(None, "standard")),
                "measured",
                "x",
            ),
        )
    )
    given = AllReduceRMSNorm(policy)
    config = Config(passes=[given])
    (again,) = Config.from_json(config.to_json()).passes
    assert again == given
    assert again.uuid() == given.uuid()
    assert AllReduceRMSNorm() != given
    assert AllReduceRMSNorm(algorithm="auto") != AllReduceRMSNorm()
    with pytest.raises(errors.InvalidField, match="algorithm must be one of"):
        AllReduceRMSNorm(algorithm="fast")


def test_without_a_workspace_the_graph_stays_and_the_plan_says_why():
    def forward(x, r, w, s):
        z = r + reduce(x)
        return llama(z, w), z

    policy = Policy((Entry(Key("cpu", 1), (Interval(None, "one_shot"),), "measured", "x"),))
    ran = run(forward, given=AllReduceRMSNorm(policy))
    assert (ran.matches, ran.operators) == (0, [])
    (entry,) = ran.compiled.plan.entries
    assert entry.collectives == (
        "standard, measured for cpu, 1 ranks, where one_shot is not admitted",
    )
    assert "one_shot is not admitted" in str(ran.compiled.plan)
    assert splitpoint.Plan.from_json(ran.compiled.plan.to_json()) == ran.compiled.plan
    near(ran)
