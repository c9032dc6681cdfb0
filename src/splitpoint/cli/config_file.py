"""A `Config` from flags and a JSON file: its own, or a vLLM `--compilation-config`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import InvalidJSON, UsageError
from .arguments import COMPILE_SIZES, MAX_SIZE, SPLIT_POINTS
from .output import say
from .vllm_config import from_vllm, is_vllms

_SPLIT_POINTS = ("split_points", "compile_ranges_split_points", "compile_ranges_endpoints")


def config_of(args: argparse.Namespace) -> Config:
    """What the flags of a verb ask for; the user is told what its file asks for in vain.

    Raises:
        UsageError, InvalidJSON, ConfigError: as `read_config`.
    """
    names = ("max_size", "split_points", "compile_sizes", "backend", "weights", "activations")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.config:
        config, left_out = read_config(args.config, given)
        if left_out:
            say(f"{args.config}: fields of vLLM without a meaning here: {', '.join(left_out)}")
        return config
    max_size = given.setdefault("max_size", MAX_SIZE)
    for name, points in (("split_points", SPLIT_POINTS), ("compile_sizes", COMPILE_SIZES)):
        given.setdefault(name, [point for point in points if point <= max_size])
    return Config.from_dict(given)


def read_config(path: Path, overrides: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration in a file, with `overrides` in place of its fields.

    The file may be a pasted vLLM `--compilation-config` (`vllm_config`). Second in the answer are
    the names of its fields that ask for nothing here, for the user to be told.

    Raises:
        UsageError: when the file cannot be read.
        InvalidJSON: when it is not a JSON object.
        ConfigError: as `Config` and `from_vllm`; a field that neither Splitpoint nor vLLM has is
            an error, and so is one of vLLM's that would have no effect.
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
    if not is_vllms(data):
        data = _without_split_points(data, overrides)
        return Config.from_json(json.dumps(data | dict(overrides))), []
    fields, left_out = from_vllm(_without_split_points(data, overrides))
    return Config.from_dict(fields | dict(overrides)), left_out


def _without_split_points(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Without the names for split points where a flag gives them."""
    if "split_points" not in overrides:
        return data
    return {name: value for name, value in data.items() if name not in _SPLIT_POINTS}
