"""The ranges of this package as vLLM's compile backend: `{"mode": 2, "backend": "splitpoint"}`.

vLLM hands the whole graph of a model to the backend once; it is split at vLLM's attention and its
updates of the KV cache, and compiled for each range of its number of tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ...config import Config
from ...errors import InvalidField, UnknownField
from ...passes.allreduce_rmsnorm import AllReduceRMSNorm
from ...passes.noop import NoopElimination
from ...runtime.dynamo_backend import Part, check_options, part_of
from ...runtime.kept_part import load_part, save_part
from ...runtime.stats import stats_of
from ...store.constants import NotKept
from ...torch_internals.kept_captures import serializable_callable
from . import names, tensor_parallel
from .chosen import chosen
from .fence import log
from .settings import settings_of
from .store import vllm_version

SPLITTING_OPS = (
    "vllm::unified_attention_with_output",
    "vllm::unified_kv_cache_update",
    "vllm::unified_mla_attention_with_output",
    "vllm::unified_mla_kv_cache_update",
)

KEEPS = serializable_callable() is not object
"""Whether what is compiled can be kept by vLLM."""


def __getattr__(name: str) -> Any:
    # vLLM looks its backend up while it makes a model, when its configuration can be asked for;
    # it calls the backend later, when it cannot.
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = names.CONFIG.value()
    given = options(config)
    if not KEEPS or given.get("runner") == "python":
        # vLLM is to keep what was captured with what this backend returns, which it cannot here.
        # It reads this after it has looked its backend up, and turns it off in the same way itself.
        os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    ranks = tensor_parallel.attach()  # here, where no rank is tracing
    fused = ranks is not None and fuses(config)

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        asked = config_of(given, fused)
        check_options(asked)
        reduces = 0
        if ranks is not None:
            reduces = tensor_parallel.replace(graph.graph, ranks)
            graph.recompile()
        left = tensor_parallel.left(graph.graph)
        start = time.perf_counter()
        part = part_of(graph, asked)
        counts = part.program.counts
        log.info(
            "Splitpoint: %d ranges in %.1f s: %d pieces compiled, %d from the store",
            len(part.program.plan.entries),
            time.perf_counter() - start,
            counts.compilations,
            counts.loads,
        )
        if ranks is not None:
            matched = stats_of([part.program], 0).matched(AllReduceRMSNorm.__name__)
            log.info("Splitpoint: %s", tensor_parallel.said(matched, reduces))
        return Kept(part, about(config), left)

    return backend


def config_of(given: Mapping[str, Any], fuses: bool) -> Config:
    """The configuration of some options; with `fuses`, its passes fuse all-reduces."""
    config = Config.from_dict(dict(given))
    if fuses:
        config = replace(config, passes=(NoopElimination(), AllReduceRMSNorm()))
    return config


def fuses(vllm_config: Any) -> bool:
    """Whether all-reduces are to be fused with norms. Settings that are none have been told of when
    the model's layers were made."""
    try:
        return settings_of(vllm_config).fuse_allreduce
    except (UnknownField, InvalidField):
        return True


def about(vllm_config: Any) -> dict[str, Any]:
    """All that what is compiled for a model depends on, beside its code, as JSON."""
    given, group = options(vllm_config), tensor_parallel.attached_group()
    config = config_of(given, group is not None and fuses(vllm_config))
    return {
        "options": {**given, "splitting_ops": list(given["splitting_ops"])},
        "group": group,
        "passes": [each.uuid() for each in config.passes],
        "kernels": chosen(vllm_config),
        "vllm": vllm_version(),
    }


class Kept(serializable_callable()):  # type: ignore[misc]
    """A compiled graph that vLLM keeps, with what Dynamo captured, and starts from.

    Args:
        part: what is called.
        about: what it depends on.
        left: what of the graph no other process could run.
    """

    def __init__(self, part: Part, about: Mapping[str, Any], left: str | None = None) -> None:
        self.part, self.about, self.left = part, about, left

    def __call__(self, *args: Any) -> Any:
        """The graph's results."""
        return self.part.run(*args)

    @classmethod
    def serialize_compile_artifacts(cls, compiled_fn: Kept) -> bytes:
        """What `deserialize_compile_artifacts` takes.

        Raises:
            NotKept: when another process could not have the same from it; vLLM then warns, and
                compiles at its next start too.
        """
        if compiled_fn.left is not None:
            raise NotKept(compiled_fn.left)
        if compiled_fn.about["kernels"] is None:
            raise NotKept("layers whose kernels the keys of vLLM's store do not tell")
        return save_part(compiled_fn.part, compiled_fn.about)

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Kept:
        """The same graph in this process, where vLLM's configuration can be asked for.

        Raises:
            Missing: when it was made for something else, or not all of it is there any more; vLLM
                then says so, and compiles.
        """
        start = time.perf_counter()
        vllm_config = names.CONFIG.value()
        now = about(vllm_config)
        fused = now["group"] is not None and fuses(vllm_config)
        part = load_part(data, now, config_of(options(vllm_config), fused))
        log.info(
            "Splitpoint: %d ranges in %.2f s, as they were kept: nothing is compiled",
            len(part.program.plan.entries),
            time.perf_counter() - start,
        )
        return cls(part, now)

    def finalize_loading(self, vllm_config: Any) -> None:
        """vLLM calls it after it has compared the sources that Dynamo captured from; all is there
        already."""


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
