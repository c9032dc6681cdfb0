"""Models from transformers with random weights, against eager, at sizes around the ranges' ends."""

import statistics

import pytest
import torch
import transformers as hf

import splitpoint
from splitpoint import Config

SIZES = (7, 1, 2, 3, 8, 9, 31, 32, 33, 100, 128)
CONFIG = Config(max_size=128, split_points=[8, 32], compile_sizes=[1])

LAYERS = 8
"""Of SmolLM2, with its own weights; the rest are like them."""
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 16}

ARCHITECTURES = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, sliding_window=16)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=256,
            word_embed_proj_dim=64,
            max_position_embeddings=256,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=256)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON)),
}


BOTH_DTYPES = ("qwen3", "mixtral")
CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in ARCHITECTURES
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or name in BOTH_DTYPES
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_agree_with_eager(name, dtype):
    model = ARCHITECTURES[name]().to(dtype).eval().requires_grad_(False)
    # fp32: re-ordered sums over at most a few hundred terms of size 1, through 3 layers.
    # bf16: compiled code keeps in fp32 what eager rounds to bf16 (2**-9 relative) after each
    # operation. Both are measured against the fp32 result, so that neither is the yardstick.
    exact = ARCHITECTURES[name]().eval().requires_grad_(False)
    exact.load_state_dict(model.state_dict())
    compiled = splitpoint.compile(model, CONFIG, dynamic_dims={"input_ids": 1})
    for size in SIZES:
        ids = torch.randint(0, 256, (1, size))
        ours = compiled(input_ids=ids, use_cache=False).logits
        assert ours.shape == (1, size, 256)
        assert ours.dtype == dtype
        with torch.no_grad():
            eager = model(input_ids=ids, use_cache=False).logits
            if dtype == torch.float32:
                torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
                continue
            reference = exact(input_ids=ids, use_cache=False).logits
        scale = reference.abs().mean()
        error = (ours.float() - reference).abs().mean() / scale
        eager_error = (eager.float() - reference).abs().mean() / scale
        if "mixtral" in name:
            # A router that is nearly tied may choose another expert after any rounding:
            # such tokens differ as a whole, in eager as much as here.
            assert error < 2 * eager_error + 0.02
        else:
            assert error < 1.5 * eager_error + 2**-9
    assert compiled.stats().unique_pieces <= 8
    assert sum(compiled.stats().dispatches.values()) == len(SIZES)


@pytest.mark.slow
def test_the_number_of_layers_does_not_change_what_is_compiled():
    counts = set()
    for layers in (3, 6):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED | {"num_hidden_layers": layers}))
        config = Config(max_size=64, compile_sizes=[1], cache_dir="")
        compiled = splitpoint.compile(model.eval(), config, dynamic_dims={"input_ids": 1})
        compiled(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=False)
        stats = compiled.stats()
        counts.add((stats.unique_pieces, stats.compilations))
        assert stats.pieces == 2 * (layers + 1)
    assert len(counts) == 1


def greedy(forward, ids, steps):
    for _ in range(steps):
        logits = forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_generates_the_same_tokens_as_eager():
    from splitpoint.models.catalogue import load

    model, tokenizer = load("smollm2", torch.float32, layers=LAYERS)
    compiled = splitpoint.compile(
        model, Config(max_size=64, split_points=[8, 32]), dynamic_dims={"input_ids": 1}
    )
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(greedy(compiled, ids, 40), greedy(model, ids, 40))
    assert compiled.stats().unique_pieces <= 6


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_smollm2_logits_agree_with_eager(dtype):
    from splitpoint.models.catalogue import load

    model, _ = load("smollm2", dtype, layers=LAYERS)
    exact, _ = load("smollm2", torch.float32, layers=LAYERS)
    exact.load_state_dict(model.state_dict())
    compiled = splitpoint.compile(model, CONFIG, dynamic_dims={"input_ids": 1})
    errors: dict[int, list[float]] = {size: [] for size in SIZES}
    eager_errors: dict[int, list[float]] = {size: [] for size in SIZES}
    often = () if dtype == torch.float32 else [size for size in SIZES if size < 16] * 8
    seldom = () if dtype == torch.float32 else SIZES * 2
    for size in [*SIZES, *seldom, *often]:
        ids = torch.randint(0, 49152, (1, size))
        with torch.no_grad():
            reference = exact(input_ids=ids, use_cache=False).logits
            eager = model(input_ids=ids, use_cache=False).logits
        ours = compiled(input_ids=ids, use_cache=False).logits
        scale = reference.abs().mean()
        errors[size].append(float((ours.float() - reference).abs().mean() / scale))
        eager_errors[size].append(float((eager.float() - reference).abs().mean() / scale))
    if dtype == torch.float32:  # dozens of re-ordered sums of 1e-7 relative error each
        assert max(map(max, errors.values())) < 1e-5
        return
    # bf16 rounds by 2**-9 some 50 times on the way, and which way is chance: for single inputs
    # each way of computing, Inductor's without this package's kernels too, is off by several
    # times what another is. So the middle one of several inputs is judged.
    for size in SIZES:
        error, eager_error = map(statistics.median, (errors[size], eager_errors[size]))
        assert error < 2 * eager_error + 2**-8
    assert sum(errors) < 1.25 * sum(eager_errors)
