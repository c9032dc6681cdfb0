"""Passes as JSON: by the name of their class, with its settings."""

from __future__ import annotations

import importlib
import operator
from typing import Any

from ..errors import InvalidJSON, NotSerializable
from .base import Pass


def pass_to_json(given: Pass) -> dict[str, Any]:
    """A pass as {"pass": "module:Class", "settings": {}}.

    Raises:
        NotSerializable: when its class cannot be imported by name.
    """
    kind = type(given)
    if "<locals>" in kind.__qualname__ or kind.__module__ == "__main__":
        raise NotSerializable(
            f"pass {kind.__qualname__} cannot be imported by name: move its class to the top "
            f"level of a module to write it as JSON"
        )
    return {"pass": f"{kind.__module__}:{kind.__qualname__}", "settings": dict(given.settings())}


def pass_from_json(entry: object) -> Pass:
    """The pass that `pass_to_json` wrote.

    Raises:
        InvalidJSON: when it is none, or cannot be made.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
        raise InvalidJSON(f"expected {{'pass': 'module:Class', 'settings': {{}}}}, got {entry!r}")
    module, _, name = entry["pass"].partition(":")
    try:
        kind = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidJSON(f"cannot import pass {entry['pass']!r}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise InvalidJSON(f"{entry['pass']!r} is not a splitpoint.Pass class")
    try:
        return kind(**entry.get("settings", {}))
    except TypeError as error:
        raise InvalidJSON(f"cannot make pass {entry['pass']!r}: {error}") from error
