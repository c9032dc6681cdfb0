"""Fill a store for a model without its weights, and say why one misses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..api import compile, signature_of
from ..capture.facts import Checker, Describer, Facts, Roots
from ..config import Config
from ..errors import StoreError
from ..models.catalogue import DTYPES, load
from ..runtime.model_key import model_fields
from ..runtime.warm_start import KIND
from ..store import open_store
from ..store.key import digest

DIMS = {"input_ids": 1}


def _arguments(config: Config) -> dict[str, Any]:
    size = min(2, config.max_size)
    return {
        "input_ids": torch.zeros(1, size, dtype=torch.int64),
        "use_cache": False,
        "logits_to_keep": 1,
    }


def fill(name: str, config: Config, dtype: str, threads: int, layers: int | None) -> str:
    """Compile a causal language model into the store of a configuration; a summary.

    Raises:
        ModelNotFound, UsageError: as `models.load`.
        StoreError: when nothing could be kept.
    """
    torch.set_num_threads(threads)
    store = open_store(config)
    if store is None:
        raise StoreError("there is no store to fill: see the line above")
    model, _ = load(name, DTYPES[dtype], layers=layers, random_weights=True)
    # What is random is not kept.
    config = replace(config, mmap_packed_weights=False)
    compiled = compile(model, config, dynamic_dims=DIMS)
    signature = signature_of(model, (), _arguments(config), DIMS)
    fields = model_fields(config, signature, Roots(model, model.forward), Describer())
    compiled(**_arguments(config))
    stats = compiled.stats()
    if fields is None or not store.keys(KIND, digest(fields)):
        raise StoreError(
            "the program could not be kept; with logging of 'splitpoint' at INFO a line says why"
        )
    return f"{store.folder}: {stats.compilations} pieces compiled, {stats.loads} found there"


def why_miss(name: str, config: Config, dtype: str, threads: int, layers: int | None) -> str:
    """What differs between a model's key and the nearest one in the store.

    Raises:
        ModelNotFound, UsageError: as `models.load`.
        StoreError: when there is no store.
    """
    torch.set_num_threads(threads)
    store = open_store(config)
    if store is None:
        raise StoreError("there is no store to look into: see the line above")
    model, _ = load(name, DTYPES[dtype], layers=layers, random_weights=True)
    signature = signature_of(model, (), _arguments(config), DIMS)
    roots = Roots(model, model.forward)
    fields = model_fields(config, signature, roots, Describer())
    if fields is None:
        return "this model cannot be kept; with logging at INFO a line says why"
    for variant in store.keys(KIND, digest(fields)):
        entry = store.read(KIND, variant, use=False)
        if entry is None:
            continue
        broken = Checker(Facts.from_json(entry["facts"]), roots).prove()
        if not broken:
            return f"no miss: {store.entry_path(KIND, variant)} serves it"
        return "\n".join(["the key is there, but what the capture read has changed:", *broken[:20]])
    nearest: tuple[int, dict[str, str]] | None = None
    for variant in store.keys(KIND):
        entry = store.read(KIND, variant, use=False)
        if entry is not None:
            differing = _differing(fields, entry["fields"])
            if nearest is None or len(differing) < nearest[0]:
                nearest = len(differing), entry["fields"]
    if nearest is None:
        return f"the store {store.folder} has no models"
    there = nearest[1]
    lines = [f"the nearest of {store.folder} differs in {nearest[0]} fields:"]
    for field in _differing(fields, there):
        lines.append(f"  {field}: {_cut(there.get(field))} there, {_cut(fields.get(field))} here")
    return "\n".join(lines)


def _differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return [f for f in sorted({*ours, *theirs}) if ours.get(f) != theirs.get(f)]


def _cut(value: str | None) -> str:
    text = "nothing" if value is None else value
    return text if len(text) <= 100 else f"{text[:97]}..."
