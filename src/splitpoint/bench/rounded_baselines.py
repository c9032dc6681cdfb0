"""Baselines that can round weights, in ways of their own: torchao's kernels, and llama.cpp."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..config import Weights
from ..errors import BaselineFailed
from ..kernels.int4 import int4_group
from ..torch_internals.baselines import forget_constants, frozen
from .baseline import PRECISIONS, Baseline, Built, Rounding, Setting, build_dynamic, with_linear
from .inputs import CompiledForward, call_each

# --- torchao's own kernels -------------------------------------------------------------


def _torchao_unavailable(setting: Setting) -> str | None:
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install torchao"
    if setting.weights is None:
        return "its kernels are for rounded weights: give --weights int8 or int4"
    if setting.dtype not in PRECISIONS:
        return f"torchao runs bf16 and fp32 models here, not {setting.dtype}"
    return None


def _torchao_rounds(setting: Setting) -> Rounding:
    return Rounding(setting.weights, setting.activations)


def _prepare_torchao(setting: Setting) -> Any:
    """A model with torchao's weights: int8 with one factor a row, with activations rounded too or
    not; int4 in groups of 64 or 32, with zero points, the head in int8 as splitpoint has it."""
    quantization = importlib.import_module("torchao.quantization")
    if setting.activations is None:
        int8 = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        int8 = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    head = None
    if hasattr(setting.model, "get_output_embeddings"):
        head = setting.model.get_output_embeddings()
    heads = {name for name, module in setting.model.named_modules() if module is head}

    def change(name: str, layer: nn.Linear) -> nn.Module:
        config = int8
        if setting.weights == "int4" and name not in heads:
            group = int4_group(layer.in_features)
            if group is None:
                raise BaselineFailed(f"torchao: no group divides the {layer.in_features} of {name}")
            # What `Int4WeightOnlyConfig` makes has no kernel for CPUs in 0.18.
            int4 = importlib.import_module("torchao.prototype.quantization.int4")
            config = int4.PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
        alone = nn.Sequential(layer)
        quantization.quantize_(alone, config)
        return alone[0]

    return with_linear(setting.model, change)


def _build_torchao(model: Any, sizes: Sequence[int]) -> CompiledForward:
    with frozen():  # Inductor takes its kernels for int8 weights where these are constants
        try:
            return build_dynamic(model, sizes)
        except (RuntimeError, NotImplementedError) as error:  # what its tensors raise
            raise BaselineFailed(
                f"torchao did not run the model: {str(error).splitlines()[0]}"
            ) from error


# --- llama.cpp -------------------------------------------------------------------------

GGUF_KINDS: dict[Weights | None, str] = {None: "", "int8": "Q8_0", "int4": "Q4_0"}
"""What is the nearest to weights as they were asked for; "" is the model's own dtype."""


def _llamacpp_unavailable(setting: Setting) -> str | None:
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install {package}"
    return None


def _llamacpp_rounds(setting: Setting) -> Rounding | None:
    # Beside weights of fewer bits it rounds activations to int8, in blocks of 32.
    return None if setting.weights is None else Rounding(setting.weights, "int8")


def _prepare_llamacpp(setting: Setting) -> Callable[[], Built]:
    from .gguf_file import gguf_of
    from .llamacpp import LlamaForward

    path = gguf_of(setting.model, setting.name, GGUF_KINDS[setting.weights])
    return lambda: LlamaForward(path, setting.dtype, setting.threads)


def _build_llamacpp(prepared: Callable[[], Built], sizes: Sequence[int]) -> Built:
    forward = prepared()
    call_each(forward, sizes)
    return forward


# --- the table -------------------------------------------------------------------------

ROUNDED = (
    Baseline(
        "torchao",
        "torch.compile(dynamic=True) with torchao's tensors, weights as constants: int8 with "
        "one factor a row, int4 in groups with zero points, the head in int8",
        _torchao_unavailable,
        _prepare_torchao,
        _build_torchao,
        free=forget_constants,
        rounds=_torchao_rounds,
    ),
    Baseline(
        "llamacpp",
        "llama.cpp, the same weights as GGUF: F32 or BF16, for --weights Q8_0 or Q4_0 with "
        "activations in int8, in blocks of 32",
        _llamacpp_unavailable,
        _prepare_llamacpp,
        _build_llamacpp,
        rounds=_llamacpp_rounds,
    ),
)
"""Entries of `baselines.BASELINES`."""
