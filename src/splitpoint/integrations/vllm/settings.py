"""What a user asks of the plug-in: the object "splitpoint" of vLLM's `--additional-config`.

It is part of the configuration that vLLM's processes share, and of the keys of its caches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

from ...config import Weights
from ...errors import InvalidField, UnknownField
from . import KEY, names


@dataclass(frozen=True)
class Settings:
    """The fields of that object."""

    weights: Weights | None = None
    """What linear layers are rounded to, as `Config.weights`."""


def settings() -> Settings:
    """The settings of the model that vLLM loads now.

    Raises:
        UnknownField: for a field that there is not.
        InvalidField: for a value that is none of its field's.
    """
    config = names.CONFIG.value()
    additional = None if config is None else config.additional_config
    # A platform may put an object of its own there.
    return parse(additional.get(KEY)) if isinstance(additional, dict) else Settings()


def parse(given: Any) -> Settings:
    """The settings of an object as JSON has it; of None the defaults.

    Raises:
        UnknownField, InvalidField: as `settings`.
    """
    if given is None:
        return Settings()
    where = f"{KEY} of --additional-config"
    if not isinstance(given, dict):
        raise InvalidField(f"{where} must be an object such as {{'weights': 'int8'}}, got {given}")
    known = [field.name for field in fields(Settings)]
    for name in given:
        if name not in known:
            raise UnknownField(f"{where} has no field {name!r}, only {', '.join(known)}")
    weights = given.get("weights")
    if weights not in (None, *get_args(Weights)):
        choices = " or ".join(map(repr, get_args(Weights)))
        raise InvalidField(f"weights of {where} must be {choices}, got {weights!r}")
    return Settings(weights)
