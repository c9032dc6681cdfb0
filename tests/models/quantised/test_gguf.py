"""GGUF files: what is in Q4_0 stays so, and computes as what it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

import splitpoint.integrations.transformers as sp
from splitpoint import Config
from splitpoint.errors import ModelNotFound, UsageError
from splitpoint.kernels.packed_linear import PackedLinear
from splitpoint.models import catalogue, tensor_parallel
from tests import tiny

IDS = torch.tensor([[5, 7, 11, 13, 17, 19]])
Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0


def rotated_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as a file has them: in each head the first, the middle one, the second, ..."""
    half = weight.shape[0] // heads // 2
    rows = [
        head * 2 * half + i + side * half
        for head in range(heads)
        for i in range(half)
        for side in (0, 1)
    ]
    return weight[rows]


def write(path: Path, kind: Any) -> Any:
    """A tiny Llama, its matrices in `kind`; the model in float32 with what they stand for."""
    model = tiny.model()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *(f"▁{i}" for i in range(config.vocab_size - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.named_parameters():
        known = names.get_name(name, try_suffixes=(".weight",))
        if tensor.dim() == 1:
            writer.add_tensor(known, tensor.numpy())
            continue
        stored = gguf.quants.quantize(tensor.numpy(), kind)
        tensor.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
        for each, count in heads.items():
            if each in name:
                stored = rotated_together(torch.from_numpy(stored), count).numpy()
        writer.add_tensor(known, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.slow
def test_what_is_in_q4_0_stays_in_4_bits(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf", Q4_0)
    model = sp.load(tmp_path / "model.gguf", torch.float32)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 7 * tiny.LAYERS
    for name, layer in packed.items():
        assert torch.equal(layer.weight(torch.float32), expected.get_parameter(f"{name}.weight"))
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        logits = expected(IDS).logits
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        sp.compile(model, Config(max_size=16, split_points=(4,), cache_dir=""))
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_too(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf", Q4_0)
    model = sp.load(tmp_path / "model.gguf")
    layer = model.model.layers[1].self_attn.k_proj
    weight = expected.get_parameter("model.layers.1.self_attn.k_proj.weight")
    assert torch.equal(layer.weight(torch.float32), weight)


def test_what_is_not_is_decoded(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf", Q8_0)
    model = sp.load(tmp_path / "model.gguf", torch.float32)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("content", [b"GGUF", b"something else altogether"])
def test_a_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelNotFound, match="cannot load"):
        sp.load(tmp_path / "model.gguf")


def test_random_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", Q4_0)
    with pytest.raises(UsageError, match="is quantised, and random weights are not"):
        catalogue.load(str(tmp_path / "model.gguf"), torch.float32, random_weights=True)


def test_parts_for_ranks_are_decoded(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf", Q4_0)
    part, _ = tensor_parallel.load(str(tmp_path / "model.gguf"), torch.float32)
    with torch.no_grad():
        made = part(IDS[0], torch.arange(IDS.shape[1]))
        torch.testing.assert_close(made, expected(IDS).logits[:, -1], rtol=1e-4, atol=1e-4)
