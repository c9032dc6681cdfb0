"""Quantised checkpoints become models that compute with their weights as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import splitpoint.integrations.transformers as sp
from splitpoint import Config
from splitpoint.errors import ModelNotFound, UnsupportedModel, UsageError
from splitpoint.kernels.packed_linear import PackedLinear
from splitpoint.models import catalogue, tensor_parallel
from tests.models.quantised import stored
from tests.models.quantised.stored import draw

IDS = torch.tensor([[5, 7, 11, 13, 17, 19]])


def gptq(n: int, k: int, seed: int, **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    drawn = draw(n, k, 32, seed=seed, size=0.02, **how)
    return drawn.weight, stored.gptq(drawn)


def act_order(n: int, k: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    return gptq(n, k, seed, act_order=True, symmetric=True)


def awq(n: int, k: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    drawn = draw(n, k, 32, seed=seed, size=0.02)
    return drawn.weight, stored.awq(drawn)


def compressed(n: int, k: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    drawn = draw(n, k, 32, symmetric=True, seed=seed, size=0.02)
    return drawn.weight, stored.compressed(drawn, True)


def int8(n: int, k: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    drawn = draw(n, k, -1, bits=8, symmetric=True, seed=seed, size=0.001)
    return drawn.weight, stored.plain_int8(drawn)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FORMATS: dict[str, tuple[Any, Any]] = {
    "gptq": (GPTQ | {"checkpoint_format": "gptq"}, gptq),
    "gptq-act-order": (GPTQ | {"desc_act": True, "sym": True}, act_order),
    "awq": (AWQ | {"modules_to_not_convert": ["lm_head"]}, awq),
    "pack-quantized": (stored.compressed_settings(4, 32, True), compressed),
    "int-quantized": (stored.compressed_settings(8, -1, True, "int-quantized"), int8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_computes_as_its_weights_do(name: str, tmp_path: Path) -> None:
    settings, layer = FORMATS[name]
    expected = stored.write(tmp_path, settings, layer)
    model = sp.load(tmp_path, torch.float32)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 7 * model.config.num_hidden_layers
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        logits = expected(IDS).logits
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        tokens = expected.generate(IDS, max_new_tokens=12, do_sample=False)
        sp.compile(model, Config(max_size=16, split_points=(4,), cache_dir=""))
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), tokens)
    for entry in sp.decoder_of(model).body.plan.entries:
        assert {kernel.split("_")[0] for kernel in entry.linear.values()} <= {"packed", "unpacked"}


@pytest.mark.parametrize("name", FORMATS)
def test_in_bfloat16_it_is_no_further_off_than_weights_rounded_to_it(
    name: str, tmp_path: Path
) -> None:
    settings, layer = FORMATS[name]
    exact = stored.write(tmp_path, settings, layer)
    model = sp.load(tmp_path)
    assert model.dtype == torch.bfloat16
    rounded = LlamaForCausalLM(exact.config).to(torch.bfloat16).eval()
    rounded.load_state_dict(exact.state_dict())
    with torch.no_grad():
        logits = exact(IDS).logits
        ours = (model(IDS).logits - logits).abs().mean()
        theirs = (rounded(IDS).logits - logits).abs().mean()
    assert ours < 1.2 * theirs


@pytest.mark.parametrize("name", ["pack-quantized", "int-quantized"])
def test_transformers_with_its_package_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    stored.write(tmp_path, *FORMATS[name])
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    with torch.no_grad():
        ours = sp.load(tmp_path, torch.float32)(IDS).logits
        # Theirs are rounded to the float16 of the scales when they are decoded.
        torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-3, atol=1e-3)


def test_biases_tied_heads_and_layers_that_were_left_out(tmp_path: Path) -> None:
    skip = ("lm_head", "layers.1.mlp.down_proj", "layers.2.self_attn.q_proj")
    expected = stored.write(tmp_path, GPTQ, gptq, skip=skip, tied=True, bias=True)
    model = sp.load(tmp_path, torch.float32)
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[2].self_attn.q_proj) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert model.model.layers[0].mlp.up_proj.bias is None
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_may_be_quantised(tmp_path: Path) -> None:
    expected = stored.write(tmp_path, GPTQ | {"lm_head": True}, gptq, skip=())
    model = sp.load(tmp_path, torch.float32)
    assert isinstance(model.lm_head, PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_several_files(tmp_path: Path) -> None:
    expected = stored.write(tmp_path, GPTQ, gptq)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {}
    for index in range(2):  # tensors of one layer lie in both
        part = {name: state[name] for name in sorted(state)[index::2]}
        places |= dict.fromkeys(part, f"model-{index}.safetensors")
        save_file(part, tmp_path / f"model-{index}.safetensors", metadata={"format": "pt"})
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with torch.no_grad():
        logits = sp.load(tmp_path, torch.float32)(IDS).logits
        torch.testing.assert_close(logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_another_dtype_leaves_weights_as_they_are(tmp_path: Path) -> None:
    expected = stored.write(tmp_path, FORMATS["int-quantized"][0], int8)
    model = sp.load(tmp_path).float()
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight(torch.float32)
    assert torch.equal(weight, expected.get_submodule(name).weight)


def test_first_layers_alone(tmp_path: Path) -> None:
    stored.write(tmp_path, AWQ, awq)
    model, _ = catalogue.load(str(tmp_path), torch.float32, layers=1)
    assert len(model.model.layers) == 1


def test_parts_for_ranks_are_decoded(tmp_path: Path) -> None:
    expected = stored.write(tmp_path, GPTQ, gptq)
    part, _ = tensor_parallel.load(str(tmp_path), torch.float32)
    with torch.no_grad():
        logits = expected(IDS).logits[:, -1]
        made = part(IDS[0], torch.arange(IDS.shape[1]))
    torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)


def test_what_is_not_taken_is_named(tmp_path: Path) -> None:
    def refused(name: str, settings: Any, layer: Any, says: str, **how: Any) -> None:
        stored.write(tmp_path / name, settings, layer, **how)
        with pytest.raises(UnsupportedModel, match=says) as caught:
            sp.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) <= 3

    refused("gemv", AWQ | {"version": "gemv"}, awq, "awq with version='gemv'")

    def small(n: int, k: int, seed: int) -> Any:
        drawn = draw(n, k, 16, seed=seed)
        return drawn.weight, stored.gptq(drawn)

    refused("small", GPTQ, small, r"layers\.0\..*_proj of a checkpoint of gptq .* groups of 16")
    refused("tied", GPTQ, gptq, "lm_head, a Linear that shares its weight", skip=(), tied=True)


def test_weights_that_are_nowhere_are_named(tmp_path: Path) -> None:
    stored.write(tmp_path, GPTQ, gptq)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFound, match=r"has no weights for model\.layers\.3\."):
        sp.load(tmp_path)


def test_scales_that_nothing_reads_are_named(tmp_path: Path) -> None:
    stored.write(tmp_path, AWQ, awq)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.mlp.act_fn.scales"] = torch.ones(64)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"act_fn\.scales of a checkpoint of awq"):
        sp.load(tmp_path)


def test_methods_that_need_packages_are_named(tmp_path: Path) -> None:
    stored.write(tmp_path, GPTQ | {"quant_method": "spqr"}, gptq)
    with pytest.raises(ModelNotFound, match="cannot load"):
        sp.load(tmp_path)


def test_random_weights_of_a_quantised_model_are_refused(tmp_path: Path) -> None:
    stored.write(tmp_path, GPTQ, gptq)
    with pytest.raises(UsageError, match="is quantised, and random weights are not"):
        catalogue.load(str(tmp_path), torch.float32, random_weights=True)


def test_saving_is_refused(tmp_path: Path) -> None:
    stored.write(tmp_path / "from", GPTQ, gptq)
    with pytest.raises(ValueError, match="not serializable"):
        sp.load(tmp_path / "from").save_pretrained(tmp_path / "to")
