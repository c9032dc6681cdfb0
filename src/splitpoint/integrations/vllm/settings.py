"""What a user asks of the plug-in: the object "splitpoint" of vLLM's `--additional-config`.

It is part of the configuration that vLLM's processes share, and of the keys of its caches.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

from ...config import Activations, Weights
from ...errors import InvalidField, UnknownField
from . import KEY, names


@dataclass(frozen=True)
class Settings:
    """The fields of that object."""

    weights: Weights | None = None
    """What linear layers are rounded to, as `Config.weights`."""
    activations: Activations | None = None
    """What these layers, heads aside, round their input to where that is faster, as
    `Config.activations`."""
    fuse_allreduce: bool = True
    """Whether the ranges of this package fuse all-reduces with the norms that follow."""


def settings() -> Settings:
    """The settings of the model that vLLM loads now.

    Raises:
        UnknownField: for a field that there is not.
        InvalidField: for a value that is none of its field's, or for activations without weights.
    """
    return settings_of(names.CONFIG.value())


def settings_of(config: Any) -> Settings:
    """The settings in one of vLLM's configurations, if it is one.

    Raises:
        UnknownField, InvalidField: as `settings`.
    """
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
    for name, kind in (("weights", Weights), ("activations", Activations)):
        value = given.get(name)
        if value not in (None, *get_args(kind)):
            choices = " or ".join(map(repr, get_args(kind)))
            raise InvalidField(f"{name} of {where} must be {choices}, got {value!r}")
    fuses = given.get("fuse_allreduce", True)
    if not isinstance(fuses, bool):
        raise InvalidField(f"fuse_allreduce of {where} must be true or false, got {fuses!r}")
    found = Settings(**given)
    if found.activations is not None and found.weights is None:
        raise InvalidField(f"activations of {where} go with weights in int8 or int4: set both")
    return found
