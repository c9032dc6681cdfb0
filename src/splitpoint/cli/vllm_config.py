"""vLLM's `--compilation-config`, field by field: what is done here, and what is refused.

Nothing that a configuration asks for is dropped: a field is a field of `Config`, or it asks for
nothing (its value is one that vLLM has by default, or turns something off), or it is refused by
name. Read from vLLM 0.10 to 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConflictingFields, InvalidField, UnknownField, UnsupportedField
from ..passes.allreduce_rmsnorm import AllReduceRMSNorm
from ..passes.base import Pass
from ..passes.noop import NoopElimination
from ..passes.sequence_parallel import SequenceParallel

TAKEN = {
    "backend": "backend",
    "compile_ranges_endpoints": "split_points",
    "compile_ranges_split_points": "split_points",
    "compile_sizes": "compile_sizes",
    "inductor_compile_config": "inductor_options",
    "splitting_ops": "splitting_ops",
}
"""Fields of vLLM's that `Config` has, and its name for them."""

_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


@dataclass(frozen=True)
class Rule:
    """A field that `Config` does not have."""

    instead: str
    """What to do about a value that asks for something."""
    asks_nothing: tuple[Any, ...] = ()
    """Values that ask for nothing, beside those that turn something off."""


_NO_GRAPHS = "no CUDA graphs are recorded here: leave it out"
_INSIDE = "it is about the inside of vLLM: leave it out"

RULES = {
    "cache_dir": Rule("vLLM keeps its own artifacts there: name Splitpoint's store instead"),
    "compile_cache_save_format": Rule("the store has one format: leave it out", ("binary",)),
    "compile_mm_encoder": Rule("compile the encoder by a call of its own"),
    "cudagraph_capture_sizes": Rule(f"{_NO_GRAPHS}, or name it in compile_sizes"),
    "cudagraph_copy_inputs": Rule(_NO_GRAPHS),
    "cudagraph_decoder_replay": Rule(_NO_GRAPHS, (True,)),
    "cudagraph_mm_encoder": Rule(_NO_GRAPHS),
    "cudagraph_mode": Rule(_NO_GRAPHS, ("NONE",)),
    "cudagraph_num_of_warmups": Rule(_NO_GRAPHS),
    "cudagraph_specialize_lora": Rule(_NO_GRAPHS, (True,)),
    "custom_ops": Rule("operators are compiled as torch has them: leave it out", (["none"],)),
    "debug_dump_path": Rule("set TORCH_LOGS=output_code to see what is compiled"),
    "decoder_replay_cudagraph_capture_sizes": Rule(_NO_GRAPHS),
    "decoder_replay_trim_threshold": Rule(_NO_GRAPHS, (768,)),
    "dynamic_shapes_config": Rule(
        "sizes are backed and size-oblivious, and their guards are evaluated: leave it out",
        (
            {"type": "backed"},
            {"type": "backed_size_oblivious"},
            {"type": "backed_size_oblivious", "evaluate_guards": True},
            {"evaluate_guards": True},
        ),
    ),
    "encoder_cudagraph_max_frames_per_batch": Rule(_NO_GRAPHS),
    "encoder_cudagraph_max_vision_items_per_batch": Rule(_NO_GRAPHS),
    "encoder_cudagraph_token_budgets": Rule(_NO_GRAPHS),
    "fast_moe_cold_start": Rule(_INSIDE),
    "full_cuda_graph": Rule(_NO_GRAPHS),
    "inductor_passes": Rule("write it as a splitpoint.Pass and name it in passes"),
    "ir_enable_torch_wrap": Rule(_INSIDE),
    "level": Rule("models are always compiled by ranges, as at level 3: leave it out", (3,)),
    "max_cudagraph_capture_size": Rule(_NO_GRAPHS),
    "mode": Rule(
        "models are always compiled by ranges, as in mode 3: leave it out",
        (3, "VLLM_COMPILE"),
    ),
    "use_cudagraph": Rule(_NO_GRAPHS),
    "use_inductor": Rule('write "backend": "eager" to do without', (True,)),
    "use_inductor_graph_partition": Rule("the graph is split at splitting_ops: name them"),
}
"""By field of vLLM's that `Config` does not have."""

_NOT_HERE = "there is no such pass here: leave it out"

PASS_RULES = {
    "dump_graph_dir": Rule("set TORCH_LOGS=output_code to see what is compiled", (".",)),
    "dump_graph_stages": Rule("set TORCH_LOGS=output_code to see what is compiled"),
    "enable_async_tp": Rule(_NOT_HERE),
    "enable_attn_fusion": Rule(_NOT_HERE),
    "enable_fusion": Rule(_NOT_HERE),
    "enable_qk_norm_rope_fusion": Rule(_NOT_HERE),
    "fi_allreduce_fusion_max_size_mb": Rule(
        "the policy decides by bytes: measure one with 'splitpoint tune collective'"
    ),
    "fuse_act_padding": Rule(_NOT_HERE),
    "fuse_act_quant": Rule(_NOT_HERE),
    "fuse_attn_quant": Rule(_NOT_HERE),
    "fuse_gemm_comms": Rule(_NOT_HERE),
    "fuse_mla_dual_rms_norm": Rule(_NOT_HERE),
    "fuse_norm_quant": Rule(_NOT_HERE),
    "fuse_qk_norm_rope_kvcache": Rule(_NOT_HERE),
    "fuse_rope_kvcache": Rule(_NOT_HERE),
    "fuse_rope_kvcache_cat_mla": Rule(_NOT_HERE),
    "rope_kvcache_fusion_max_token_num": Rule(_NOT_HERE, (256,)),
}
"""By field of vLLM's `pass_config` that asks for no pass of ours."""


@dataclass(frozen=True)
class PassRule:
    """A pass of ours that vLLM has too."""

    names: tuple[str, ...]
    """Its switch in `pass_config`, the newest name first."""
    make: Callable[[Mapping[str, Any]], Pass]
    by_default: bool = False


PASSES = (
    PassRule(("eliminate_noops", "enable_noop"), lambda _: NoopElimination(), by_default=True),
    # Before the fusion: what is split is not fused any more.
    PassRule(
        ("enable_sp", "enable_sequence_parallelism"),
        lambda given: SequenceParallel(min_size=given.get("sp_min_token_num") or 1),
    ),
    PassRule(("fuse_allreduce_rms", "enable_fi_allreduce_fusion"), lambda _: AllReduceRMSNorm()),
)
"""In the order in which they run."""

ONLY_VLLM = frozenset({*RULES, *TAKEN, "pass_config"}) - {
    # `Config` has these, too.
    *("backend", "cache_dir", "compile_sizes", "cudagraph_capture_sizes", "splitting_ops")
}
"""Fields that show a configuration to be vLLM's."""


def is_vllms(data: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of vLLM's."""
    return bool(ONLY_VLLM & data.keys()) or _names_it(data.get("compile_sizes"))


def from_vllm(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a `Config` that does what a configuration of vLLM's asks for, and the names
    of the fields that ask for nothing.

    Raises:
        UnsupportedField: for a field that asks for something that is not here.
        UnknownField: for a pass that vLLM does not have either.
        ConflictingFields: when two names of one pass are given different values.
        InvalidField: when a part of it has the wrong type.
    """
    fields: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in data.items():
        if name in RULES:
            if name == "cudagraph_capture_sizes" and _names_it(data.get("compile_sizes")):
                continue
            _refuse_unless_nothing(name, value, RULES[name])
            left_out.append(name)
        elif name == "pass_config":
            fields["passes"] = _passes(value)
        elif value is not None and value != "":  # which stand for the default
            fields[TAKEN.get(name, name)] = value
    if "compile_sizes" in fields:
        fields["compile_sizes"] = _sizes(fields["compile_sizes"], data)
    for name in ("compile_ranges_endpoints", "compile_ranges_split_points"):
        other = data.get(name)
        if other is not None and other != fields.get("split_points"):
            raise ConflictingFields(
                f"{name}={other} and split points {fields.get('split_points')} name the same "
                f"thing: give one of them"
            )
    return fields, sorted(left_out)


def _refuse_unless_nothing(name: str, value: Any, rule: Rule) -> None:
    # 1 == True in Python, but not as a value of a field.
    same = [each for each in (*_OFF, *rule.asks_nothing) if each == value]
    if not any(type(each) is type(value) for each in same):
        raise UnsupportedField(f"{name}={value!r} has no effect here: {rule.instead}")


def _passes(given: Any) -> tuple[Pass, ...]:
    """The passes that a `pass_config` asks for."""
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise InvalidField(f"pass_config must be an object of switches, got {given!r}")
    own = {name for rule in PASSES for name in rule.names} | {"sp_min_token_num"}
    for name, value in given.items():
        if name in PASS_RULES:
            _refuse_unless_nothing(f"pass_config.{name}", value, PASS_RULES[name])
        elif name not in own:
            known = ", ".join(sorted({*own, *PASS_RULES}))
            raise UnknownField(f"vLLM has no pass_config.{name}; it has {known}")
    made = []
    for rule in PASSES:
        values = {name: given[name] for name in rule.names if given.get(name) is not None}
        if not all(isinstance(value, bool) for value in values.values()):
            raise InvalidField(f"pass_config switches are true or false, got {values}")
        if len(set(values.values())) > 1:
            raise ConflictingFields(f"pass_config has {values}, two names of one pass: keep one")
        if next(iter(values.values()), rule.by_default):
            made.append(rule.make(given))
    return tuple(made)


def _names_it(sizes: Any) -> bool:
    return isinstance(sizes, list) and "cudagraph_capture_sizes" in sizes


def _sizes(sizes: Any, data: Mapping[str, Any]) -> Any:
    if not _names_it(sizes):
        return sizes
    captured = data.get("cudagraph_capture_sizes")
    if not isinstance(captured, list):
        raise InvalidField(
            "compile_sizes names cudagraph_capture_sizes, which the file does not hold: write the "
            "sizes themselves"
        )
    both = [size for size in sizes if size != "cudagraph_capture_sizes"] + captured
    # Anything but an integer is left for Config to name.
    return sorted(set(both)) if all(isinstance(size, int) for size in both) else both
