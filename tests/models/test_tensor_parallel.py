import pytest
import torch
import torch.distributed as dist

import splitpoint
from splitpoint import Config, errors
from splitpoint.collectives.launch import run_ranks
from splitpoint.models.tensor_parallel import Shape, TensorParallelLlama, load
from splitpoint.passes.allreduce_rmsnorm import AllReduceRMSNorm
from splitpoint.torch_internals.inductor import fresh_inductor_cache
from tests import tiny

CONFIG = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 48}


@pytest.fixture(scope="module")
def whole():
    """3 key-value heads, which 2 ranks do not divide."""
    from transformers import LlamaForCausalLM

    config = tiny.config()
    for name, value in CONFIG.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def inputs(size):
    ids = torch.randint(tiny.VOCABULARY, (size,), generator=torch.Generator().manual_seed(size))
    return ids, torch.arange(size)


def test_one_rank_is_the_hugging_face_model(whole):
    alone = TensorParallelLlama(whole.state_dict(), Shape.of(whole.config))
    for size in (1, 2, 7, 33):
        ids, positions = inputs(size)
        expected = whole(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0]
        torch.testing.assert_close(alone(ids, positions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_heads_of_zeros_change_nothing(whole, dtype, rounding):
    """But the order in which a library may sum a product of another shape."""
    shape, state = Shape.of(whole.config), whole.to(dtype).state_dict()
    plain = TensorParallelLlama(state, shape)
    padded = TensorParallelLlama(state, shape, pad_to=2)
    assert (shape.padded(2).heads, shape.padded(2).kv_heads) == (8, 4)
    assert padded.layers[0].qkv.shape[0] > plain.layers[0].qkv.shape[0]
    for size in (1, 2, 7, 33):
        logits = plain(*inputs(size)), padded(*inputs(size))
        torch.testing.assert_close(*logits, rtol=rounding, atol=rounding)
    whole.to(torch.float32)


def test_other_models_are_refused(whole):
    from copy import deepcopy

    for name, value in (("model_type", "opt"), ("attention_bias", True)):
        config = deepcopy(whole.config)
        setattr(config, name, value)
        with pytest.raises(errors.UsageError, match=f"{name}={value!r}"):
            Shape.of(config)


def serve(folder):
    """In a rank: the compiled model's logits by size, and what was matched."""
    model, _ = load(folder, torch.float32, dist.group.WORLD)
    config = Config(
        max_size=64,
        compile_sizes=[1],
        linear="inductor",
        lazy=True,
        passes=[AllReduceRMSNorm(algorithm="reference")],
    )
    compiled = splitpoint.compile(model, config)
    with fresh_inductor_cache():  # a piece from a cache shows no matches
        logits = {size: compiled(*inputs(size)) for size in (2, 7, 33)}
    stats = compiled.stats()
    return logits, stats.matched("AllReduceRMSNorm"), stats.matches, compiled.stats().pieces


@pytest.mark.processes
def test_two_ranks_compiled_match_every_norm_and_agree_with_one(whole, tmp_path):
    whole.save_pretrained(tmp_path / "model")
    results = run_ranks(2, 1, serve, str(tmp_path / "model"))
    alone = TensorParallelLlama(whole.state_dict(), Shape.of(whole.config), pad_to=2)
    for logits, matched, matches, pieces in results:
        for size, found in logits.items():
            torch.testing.assert_close(found, alone(*inputs(size)), rtol=1e-4, atol=1e-5)
        assert pieces == tiny.LAYERS + 1
        assert [note for count in matches for note in count.notes] == []
        assert {str(range_): count for range_, count in matched.items()} == {
            "[1,64]": 2 * tiny.LAYERS
        }
    for size, found in results[0][0].items():
        assert torch.equal(found, results[1][0][size]), "ranks differ"
