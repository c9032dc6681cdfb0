"""A `Config` from a JSON file: its own, or a vLLM `--compilation-config`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import Config
from .errors import InvalidJSON, UsageError

VLLM_ONLY = frozenset(
    {
        "compile_cache_save_format",
        "compile_mm_encoder",
        "cudagraph_capture_sizes",
        "cudagraph_copy_inputs",
        "cudagraph_mode",
        "cudagraph_num_of_warmups",
        "cudagraph_specialize_lora",
        "custom_ops",
        "debug_dump_path",
        "dynamic_shapes_config",
        "fast_moe_cold_start",
        "full_cuda_graph",
        "inductor_compile_config",
        "inductor_passes",
        "level",
        "max_cudagraph_capture_size",
        "mode",
        "pass_config",
        "use_cudagraph",
        "use_inductor",
        "use_inductor_graph_partition",
    }
)
"""Fields of vLLM's compilation config that mean nothing here."""

_OTHER_MEANING = frozenset({"cache_dir"})
"""Fields that both have: where vLLM keeps its artifacts is no place for ours."""

_SPLIT_POINTS = ("split_points", "compile_ranges_split_points", "compile_ranges_endpoints")


def read_config(path: Path, overrides: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration in a file, with `overrides` in place of its fields.

    The file may be a pasted vLLM `--compilation-config`: its split points, compile sizes and
    splitting ops are used, and the fields that only vLLM has are left out. Second in the
    answer are the names of those left out, for the user to be told.

    Raises:
        UsageError: when the file cannot be read.
        InvalidJSON: when it is not a JSON object.
        ConfigError: as `Config`; a field that neither Splitpoint nor vLLM has is an error.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --config {path}: {error}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidJSON(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidJSON(f"{path} must hold a JSON object, got {type(data).__name__}")
    left_out: list[str] = []
    if VLLM_ONLY & data.keys() or "compile_ranges_split_points" in data:
        left_out = sorted((VLLM_ONLY | _OTHER_MEANING) & data.keys())
        data = _from_vllm(data)
    if "split_points" in overrides:
        data = {name: value for name, value in data.items() if name not in _SPLIT_POINTS}
    return Config.from_json(json.dumps(data | dict(overrides))), left_out


def _from_vllm(data: Mapping[str, Any]) -> dict[str, Any]:
    # In vLLM null, and "" for the backend, stand for the default.
    fields = {
        name: value
        for name, value in data.items()
        if name not in VLLM_ONLY | _OTHER_MEANING and value is not None and value != ""
    }
    sizes = fields.get("compile_sizes")
    if isinstance(sizes, list) and "cudagraph_capture_sizes" in sizes:
        captured = data.get("cudagraph_capture_sizes")
        if not isinstance(captured, list):
            raise UsageError(
                "compile_sizes names cudagraph_capture_sizes, which the file does not hold: "
                "write the sizes themselves"
            )
        both = [size for size in sizes if size != "cudagraph_capture_sizes"] + captured
        # Anything but an integer is left for Config to name.
        whole = all(isinstance(size, int) for size in both)
        fields["compile_sizes"] = sorted(set(both)) if whole else both
    return fields
