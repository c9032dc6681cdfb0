"""Small random models of several kinds."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from splitpoint import Config

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}

PLAIN = Config(max_size=64, split_points=[8], compile_sizes=[1], cache_dir="", backend="eager")


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**SIZES, sliding_window=16)
    return transformers.Gemma3ForCausalLM(config)


def gemma2() -> Any:
    """Attention and logits are capped."""
    config = transformers.Gemma2Config(
        **SIZES, sliding_window=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    )
    return transformers.Gemma2ForCausalLM(config)


def phi3() -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=211,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neo() -> Any:
    """Attention of its own, which no registry replaces."""
    config = transformers.GPTNeoConfig(
        vocab_size=211,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPTNeoForCausalLM(config)


def long_rope() -> Any:
    """Positions are turned otherwise in calls of more than 64."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope))


def dynamic_rope() -> Any:
    """As `long_rope`, from 64 positions on."""
    sizes = SIZES | {"max_position_embeddings": 64}
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope))


def deepseek_v3() -> Any:
    """Keys of another size than values."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = transformers.DeepseekV3Config(
        **(sizes | {"num_key_value_heads": 4}),
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=24,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def stablelm() -> Any:
    """Attention that is not told what its model was given."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes))


MODELS = (llama, qwen3, gemma3, gemma2, phi3, qwen3_moe, gpt2)


def made(make: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return make().eval().requires_grad_(False).to(dtype)


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(1, 211, (batch, count), generator=chance)
