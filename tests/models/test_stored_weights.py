"""A rank's slices read from files: those of the whole model to the bit, and no more memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

import splitpoint
from splitpoint.errors import ModelNotFound
from splitpoint.models import catalogue, tensor_parallel
from splitpoint.models.stored_weights import StoredTensor, stored_weights
from splitpoint.models.tensor_parallel import SPLIT_DIMENSION, Shape, TensorParallelLlama, load
from tests import tiny

PACKAGE = str(Path(splitpoint.__file__).parents[1])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(**changes: Any) -> Any:
    """3 key-value heads and 62 channels, which few numbers of ranks divide."""
    found = tiny.config()
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 48}
    for name, value in {**sizes, "intermediate_size": 62, **changes}.items():
        setattr(found, name, value)
    return found


FOLDERS = {
    "tied in one file": {"tied": True, "shard": "1GB"},
    "tied in several files": {"tied": True, "shard": "20KB"},
    "a head of its own in several files": {"tied": False, "shard": "20KB"},
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = FOLDERS[request.param]
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(tie_word_embeddings=options["tied"]))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, max_shard_size=options["shard"])
    assert (path / "model.safetensors.index.json").exists() == (options["shard"] == "20KB")
    return path


def reference_shard(weights: Any, whole: Shape, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The plain way: the whole weight filled up with zeros, cut in equal chunks."""
    lengths = tensor_parallel._split_lengths(whole)
    own = dict(weights)
    for name, dim in SPLIT_DIMENSION.items():
        missing = lengths[name] - weights[name].shape[dim]
        pad = (0, 0, 0, missing) if dim == 0 else (0, missing)
        own[name] = F.pad(weights[name], pad).chunk(ranks, dim)[rank].contiguous()
    return own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_slices_are_those_of_the_whole_model_to_the_bit(
    folder: Path, ranks: int, dtype: str
) -> None:
    state = catalogue.load(str(folder), DTYPES[dtype])[0].state_dict()
    stored = stored_weights(folder, DTYPES[dtype])
    assert stored is not None
    whole = Shape.of(config()).padded(ranks)
    for layer in range(tiny.LAYERS):
        for rank in range(ranks):
            expected, *found = (
                way(tensor_parallel._weights(source, layer), whole, rank, ranks)
                for way, source in (
                    (reference_shard, state),
                    (tensor_parallel._shard, state),
                    (tensor_parallel._shard, stored),
                )
            )
            for each in found:
                assert each.keys() == expected.keys()
                for name, tensor in each.items():
                    assert tensor.is_contiguous()
                    assert tensor.dtype == DTYPES[dtype]
                    assert torch.equal(tensor, expected[name]), (name, rank)


@pytest.mark.parametrize("pad_to", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [None, 2])
def test_a_model_from_slices_is_that_from_the_whole_to_the_bit(
    folder: Path, layers: int | None, dtype: str, pad_to: int | None, monkeypatch: Any
) -> None:
    state = catalogue.load(str(folder), DTYPES[dtype], layers=layers)[0].state_dict()
    shape = Shape.of(catalogue.find(str(folder), layers=layers)[0])
    expected = TensorParallelLlama(state, shape, pad_to=pad_to).state_dict()
    monkeypatch.delattr(catalogue, "load")  # not even asked
    model, _ = load(str(folder), DTYPES[dtype], layers=layers, pad_to=pad_to)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    tied = "lm_head.weight" not in json.dumps([*(stored_weights(folder, torch.float32) or ())])
    assert (model.head is model.embedding) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_in_another_format_are_read_whole(tmp_path: Path) -> None:
    model = LlamaForCausalLM(config())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert stored_weights(tmp_path, torch.float32) is None
    found, _ = load(str(tmp_path), torch.float32)
    assert torch.equal(found.embedding, model.state_dict()["model.embed_tokens.weight"])


def test_a_head_in_the_file_of_a_tied_model_is_what_transformers_makes_of_it(
    tmp_path: Path,
) -> None:
    model = LlamaForCausalLM(config(tie_word_embeddings=False))
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert "lm_head.weight" in (stored_weights(tmp_path, torch.float32) or {})
    found, _ = load(str(tmp_path), torch.float32)
    expected = catalogue.load(str(tmp_path), torch.float32)[0]
    assert torch.equal(found.head, expected.lm_head.weight)


@pytest.mark.parametrize("damage", ["truncated", "gone", "index"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    LlamaForCausalLM(config()).save_pretrained(tmp_path, max_shard_size="20KB")
    path = sorted(tmp_path.glob("model-*.safetensors"))[1]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "gone":
        path.unlink()
    else:
        path = tmp_path / "model.safetensors.index.json"
        path.write_text("{}")
    with pytest.raises(ModelNotFound, match=path.name):
        load(str(tmp_path), torch.float32)


def test_a_part_is_as_that_of_a_tensor(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensor = torch.randn(7, 5)
    save_file({"a": tensor}, tmp_path / "file")
    stored = StoredTensor(tmp_path / "file", "a", (7, 5), torch.float64)
    assert torch.equal(stored.whole(), tensor.double())
    for dim in (0, 1):
        for start in range(tensor.shape[dim] + 1):
            for length in range(tensor.shape[dim] + 1 - start):
                part = stored.narrow(dim, start, length)
                assert torch.equal(part, tensor.narrow(dim, start, length).double())


MEMORY = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from splitpoint.models import catalogue
from splitpoint.models.tensor_parallel import Shape, TensorParallelLlama, load
from transformers import LlamaForCausalLM

def resident(field):  # getrusage would count what the parent had
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

folder, way, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
load(sys.argv[4], torch.bfloat16, dist.group.WORLD)  # imports what there is to import
before = resident("VmRSS")
if way == "slices":
    model, _ = load(folder, torch.bfloat16, dist.group.WORLD)
else:
    whole, _ = catalogue.load(folder, torch.bfloat16)
    shape = Shape.of(whole.config)
    model = TensorParallelLlama(whole.state_dict(), shape, dist.group.WORLD)
share = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([share, resident("VmHWM") - before]))
"""


def peak(*arguments: str) -> tuple[int, int]:
    """The bytes of a rank's weights, and the most that loading them took."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    share, most = json.loads(done.stdout.splitlines()[-1])
    return share, most


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_needs_memory_for_about_its_share(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    model = LlamaForCausalLM(config(**sizes, **heads))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    small = str(tiny.save(tmp_path / "small"))
    share, by_slices = peak(str(tmp_path / "large"), "slices", "8", small)
    assert share < whole / 2 / 7  # read from fp32 as bf16
    # A layer takes twice its part while it is put together, and pages of one matrix in its file.
    assert by_slices < 2 * share
    _, by_whole = peak(str(tmp_path / "large"), "whole", "8", small)
    assert by_whole > whole / 2  # the measure shows what it should
