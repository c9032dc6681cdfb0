"""Quantised weights as each format stores them, written by its definition, and what they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests import tiny

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Drawn:
    """A weight of unsigned values: (q - z) * s."""

    bits: int
    q: np.ndarray[Any, Any]
    """[n, k]."""
    z: np.ndarray[Any, Any]
    """[n, groups]."""
    s: Tensor
    """[n, groups], of the dtype that is stored."""
    group_of: np.ndarray[Any, Any]
    """[k]."""

    @property
    def weight(self) -> Tensor:
        """[n, k] in float64: exact."""
        n, k = self.q.shape
        found = torch.empty(n, k, dtype=torch.float64)
        for i in range(k):
            g = int(self.group_of[i])
            off = torch.from_numpy(self.q[:, i] - self.z[:, g]).double()
            found[:, i] = off * self.s[:, g].double()
        return found


def draw(
    n: int,
    k: int,
    group: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    size: float = 0.05,
) -> Drawn:
    """Any values, zero points from 1 on, and scales around `size`."""
    rng = np.random.default_rng(seed)
    per = k if group == -1 else group
    groups = -(-k // per)
    z = np.full((n, groups), 2 ** (bits - 1))
    if not symmetric:
        z = rng.integers(1, 2**bits, (n, groups))
    group_of = np.arange(k) // per
    scales = size * (0.5 + rng.random((n, groups))) * rng.choice([-1, 1], (n, groups))
    return Drawn(
        bits,
        rng.integers(0, 2**bits, (n, k)),
        z,
        torch.from_numpy(scales).to(dtype),
        rng.permutation(group_of) if act_order else group_of,
    )


def words(values: np.ndarray[Any, Any], bits: int) -> Tensor:
    """[..., count] values as int32 words, one after the other from the lowest bits on; the last
    one filled up with zeros."""
    per = 32 // bits
    *rows, count = values.shape
    padded = np.zeros((*rows, -(-count // per) * per), dtype=np.uint64)
    padded[..., :count] = values
    made = np.zeros((*rows, padded.shape[-1] // per), dtype=np.uint64)
    for i in range(per):
        made |= padded[..., i::per] << np.uint64(bits * i)
    return torch.from_numpy(made.astype(np.uint32).view(np.int32))


def gptq(drawn: Drawn, version: str = "gptq", with_order: bool = True) -> dict[str, Tensor]:
    stored = drawn.z.T - (1 if version == "gptq" else 0)
    found = {
        "qweight": words(drawn.q, drawn.bits).t(),
        "qzeros": words(stored, drawn.bits),
        "scales": drawn.s.t(),
    }
    if with_order:
        found["g_idx"] = torch.from_numpy(drawn.group_of).int()
    return {name: each.contiguous() for name, each in found.items()}


def awq(drawn: Drawn) -> dict[str, Tensor]:
    def turned(each: np.ndarray[Any, Any]) -> Tensor:
        """Words of eight columns, whose i-th value is the column AWQ_ORDER[i]."""
        n = each.shape[0]
        order = [8 * (i // 8) + AWQ_ORDER[i % 8] for i in range(n)]
        return words(each.T[:, order], 4)

    return {
        "qweight": turned(drawn.q),
        "qzeros": turned(drawn.z),
        "scales": drawn.s.t().contiguous(),
    }


def compressed(drawn: Drawn, symmetric: bool, with_order: bool = False) -> dict[str, Tensor]:
    found = {
        "weight_packed": words(drawn.q, drawn.bits),
        "weight_scale": drawn.s,
        "weight_shape": torch.tensor(drawn.q.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = words(drawn.z.T, drawn.bits).t().contiguous()
    if with_order:
        found["weight_g_idx"] = torch.from_numpy(drawn.group_of).int()
    return found


def plain_int8(drawn: Drawn) -> dict[str, Tensor]:
    """As "int-quantized" has it."""
    return {
        "weight": torch.from_numpy(drawn.q - 128).to(torch.int8),
        "weight_scale": drawn.s,
    }


def compressed_settings(
    bits: int, group: int, symmetric: bool, form: str = "pack-quantized"
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
    }


# --- a checkpoint ----------------------------------------------------------------------


def write(
    folder: Path,
    settings: dict[str, Any],
    layer: Any,
    *,
    skip: tuple[str, ...] = ("lm_head",),
    tied: bool = False,
    bias: bool = False,
) -> Any:
    """A checkpoint of a tiny Llama in float16, its layers stored as `layer(n, k, seed)` gives:
    (weight [n, k], tensors). The same model in float32 with those weights is returned."""
    config = tiny.config()
    config.tie_word_embeddings, config.attention_bias = tied, bias
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).half().float().eval().requires_grad_(False)
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter).half())
    state = {name: value.half() for name, value in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith(skip):
            weight, tensors = layer(*module.weight.shape, seed)
            module.weight.copy_(weight)
            state.pop(f"{name}.weight", None)
            state |= {f"{name}.{each}": tensor for each, tensor in tensors.items()}
    folder.mkdir(exist_ok=True, parents=True)
    state = {name: each.contiguous() for name, each in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"quantization_config": settings, "dtype": "float16"}
    written["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(written))
    return model
