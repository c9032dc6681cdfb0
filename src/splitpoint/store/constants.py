"""Constants of generated code as JSON: by name, never by pickling."""

from __future__ import annotations

import importlib
import json
import math
import types
from typing import Any

import torch

from ..torch_internals.containers import TreeSpec, tree_unflatten, treespec_dumps, treespec_loads
from ..torch_internals.operators import OPERATOR_TYPES, operator_at, operator_path

Json = Any

_HOMES = ("torch._C._nn", "torch", "torch.nn.functional", "operator", "math")
"""Where built-in functions are found that do not say where they are."""


class NotKept(Exception):
    """A value that cannot be written so that another process gives the same; says what."""


def encode(value: Any) -> Json:
    """A list that `decode` makes the value from.

    Raises:
        NotKept: when there is none.
    """
    if value is tree_unflatten:
        return ["unflatten"]
    if isinstance(value, types.ModuleType) and value is math:
        return ["module", "math"]
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return ["torch", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, OPERATOR_TYPES):
        return ["operator", *operator_path(value)]
    if isinstance(value, TreeSpec):
        try:
            return ["spec", treespec_dumps(value)]
        except (NotImplementedError, TypeError, ValueError) as error:
            raise NotKept(f"a result of type {value.type}: {error}") from error
    if callable(value):
        name = str(getattr(value, "__qualname__", None) or getattr(value, "__name__", ""))
        for home in (getattr(value, "__module__", None), *_HOMES):
            if home and _find(home, name) is value:
                return ["object", home, name]
    raise NotKept(f"a {type(value).__module__}.{type(value).__qualname__}")


def decode(data: Json) -> Any:
    """The value of what `encode` gave.

    Raises:
        LookupError: when it is not there in this process.
    """
    kind, *rest = data
    if kind == "unflatten":
        return tree_unflatten
    if kind == "module":
        return math
    if kind == "float":
        return float.fromhex(rest[0])
    if kind == "torch":
        return getattr(torch, rest[0])
    if kind == "device":
        return torch.device(rest[0])
    if kind == "operator":
        return operator_at(rest)
    if kind == "spec":
        json.loads(rest[0])
        return treespec_loads(rest[0])
    if kind == "object":
        found = _find(rest[0], rest[1])
        if found is None:
            raise LookupError(f"{rest[0]}.{rest[1]} is not there")
        return found
    raise LookupError(f"a constant of kind {kind!r}")


def _find(module: str, name: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found
