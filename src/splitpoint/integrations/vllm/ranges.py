"""The ranges of this package as vLLM's compile backend: `{"mode": 2, "backend": "splitpoint"}`.

vLLM hands the whole graph of a model to the backend once; it is split at vLLM's attention and its
updates of the KV cache, and compiled for each range of its number of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ...config import Config
from ...passes.allreduce_rmsnorm import AllReduceRMSNorm
from ...passes.noop import NoopElimination
from ...runtime.dynamo_backend import dynamo_backend, part_of
from ...runtime.stats import stats_of
from . import names, tensor_parallel
from .fence import log

SPLITTING_OPS = (
    "vllm::unified_attention_with_output",
    "vllm::unified_kv_cache_update",
    "vllm::unified_mla_attention_with_output",
    "vllm::unified_mla_kv_cache_update",
)


def __getattr__(name: str) -> Any:
    # vLLM looks its backend up while it makes a model, when its configuration can be asked for;
    # it calls the backend later, when it cannot.
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Its own store of compiled models would ask of this backend what it does not have. vLLM reads
    # this after it has looked its backend up, and turns it off in the same way itself.
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    given = options(names.CONFIG.value())
    ranks = tensor_parallel.attach()  # here, where no rank is tracing

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if ranks is None:
            return dynamo_backend(graph, example_inputs, options=given)
        reduces = tensor_parallel.replace(graph.graph, ranks)
        graph.recompile()
        config = replace(Config.from_dict(given), passes=(NoopElimination(), AllReduceRMSNorm()))
        part = part_of(graph, config)
        matched = stats_of([part.program], 0).matched(AllReduceRMSNorm.__name__)
        log.info("Splitpoint: %s", tensor_parallel.said(matched, reduces))
        return part.run

    return backend


def options(vllm_config: Any) -> dict[str, Any]:
    """Fields of this package's `Config` from vLLM's: the `compile_ranges_endpoints` of its
    `--compilation-config` are the split points."""
    config = vllm_config.compilation_config
    most = vllm_config.scheduler_config.max_num_batched_tokens
    points = sorted({point for point in config.compile_ranges_endpoints or () if point < most})
    return {
        "max_size": most,
        **({"runner": "python"} if _names_are_objects() else {}),
        "split_points": points,
        "compile_sizes": sorted(set(config.compile_sizes or ())),
        "splitting_ops": config.splitting_ops or SPLITTING_OPS,
    }


def _names_are_objects() -> bool:
    """Whether vLLM gives its operators names of layers as inputs of the graph, which the program in
    C++ does not take: VLLM_USE_LAYERNAME=0 makes them strings in it."""
    import vllm.envs

    return bool(vllm.envs.VLLM_USE_LAYERNAME)
