"""Keep a compiled program in a store, and start from it without capturing or compiling.

A manifest holds all that a first call made: which sizes go where, the stitched functions, the
code of the pieces and the digests of their libraries, where the module has the tensors that
they read, and the facts that the capture relied on. A start reads one file, proves the facts
against the module as it is, and loads the libraries; what cannot be proven is a miss.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.facts import Checker, Describer, Facts, Roots, Unprovable, collect
from ..capture.module_state import ModuleState
from ..capture.reads import Reads
from ..capture.regions import Regions
from ..capture.signature import Signature
from ..compilers.artifact import Missing
from ..config import Config
from ..errors import StateChanged
from ..graph.pieces import Split
from ..kernels.devices import Device, common_device, device_row
from ..store.constants import NotKept
from ..store.key import digest
from ..store.store import Store
from ..torch_internals.guard_expressions import NotPortable
from ..torch_internals.state import QUICK_STATE, quick_state
from .dispatch import Dispatch
from .garbage import no_collection, rare_collection
from .kept_lanes import LanesLoader, lanes_entry
from .lanes import Graph
from .model_key import model_fields, tensor_kind
from .program import Program

log = logging.getLogger("splitpoint")

KIND = "models"

MOST_VARIANTS = 8
"""Manifests of one key (states of a module that are not part of it) that are tried."""

_EMPTY = Split((), (), (), {})


# --- keeping ---------------------------------------------------------------------------


def save(
    store: Store,
    key: str,
    fields: Mapping[str, str],
    dispatch: Dispatch,
    config: Config,
    roots: Roots,
) -> bool:
    """Keep what serves a signature, whose lanes are all compiled; False, with a line in the log,
    when it cannot be kept."""
    try:
        entry = _entry(store, dispatch, config, roots)
        assert dispatch.regions is not None
        # What was read for the entry is to be what was compiled.
        with torch.no_grad():  # as it was at capture
            unchanged = all(captured.state.check() for captured in dispatch.regions.captures)
        if not unchanged:
            raise NotKept("a module that changed since it was captured")
    except (NotKept, NotPortable, Unprovable) as why:
        log.info("store: the program is not kept: it has %s", why)
        return False
    entry["fields"] = dict(fields)
    variant = hashlib.sha256(json.dumps(entry["facts"], sort_keys=True).encode()).hexdigest()[:8]
    return store.write(KIND, f"{key}-{variant}", entry)


def _entry(store: Store, dispatch: Dispatch, config: Config, roots: Roots) -> dict[str, Any]:
    lanes, regions = dispatch.lanes, dispatch.regions
    assert regions is not None
    graphs = list({id(lane.graph): lane.graph for lane in lanes}.values())
    describer = Describer()
    expressions: dict[str, None] = {}
    traced: list[Any] = []
    for captured in regions.captures:
        expressions |= captured.read(set(map(id, captured.state.fetch())))
        traced += captured.traced_code
    facts = collect(expressions, traced, roots, describer)
    methods = dict.fromkeys(each for captured in regions.captures for each in captured.methods)
    facts.methods = tuple(methods)
    paths = _paths(roots.owner)
    return {
        "facts": facts.to_json(),
        "graphs": [
            {
                "bound": [_path(paths, tensor) for tensor in graph.bound],
                "kinds": [tensor_kind(tensor) for tensor in graph.bound],
                "arguments": graph.argument_count,
                "pieces": graph.piece_count,
                "unique": list(graph.unique),
                "conditions": [[a.code, a.origin] for a in graph.conditions],
            }
            for graph in graphs
        ],
        "notes": list(dispatch.notes),
        "refusals": list(regions.refusals),
        "captures": len(regions.captures),
        **lanes_entry(store, lanes, graphs, config.max_size),
    }


def _paths(owner: torch.nn.Module | None) -> dict[int, tuple[str, str, str]]:
    """(module, holder, name) of each tensor of a tree by id, the first where it has several."""
    found: dict[int, tuple[str, str, str]] = {}
    if owner is not None:
        for path, module in owner.named_modules(remove_duplicate=False):
            for holder in ("_parameters", "_buffers"):
                for name, tensor in getattr(module, holder).items():
                    if tensor is not None:
                        found.setdefault(id(tensor), (path, holder, name))
    return found


def _path(paths: Mapping[int, tuple[str, str, str]], tensor: torch.Tensor) -> list[str]:
    try:
        return list(paths[id(tensor)])
    except KeyError:
        raise NotKept("a tensor that the module tree does not hold") from None


# --- starting --------------------------------------------------------------------------


def load(
    store: Store,
    key: str,
    program: Program,
    signature: Signature,
    roots: Roots,
    describer: Describer,
) -> Dispatch | None:
    """What serves a signature, as the store has it under a key, ready to run in a program; None
    when the store has nothing that fits."""
    with no_collection():
        return _load(store, key, program, signature, roots, describer)


def _load(
    store: Store,
    key: str,
    program: Program,
    signature: Signature,
    roots: Roots,
    describer: Describer,
) -> Dispatch | None:
    for variant in store.keys(KIND, f"{key}-")[:MOST_VARIANTS]:
        entry = store.read(KIND, variant)
        if entry is None:
            continue
        facts = Facts.from_json(entry["facts"])
        checker = Checker(facts, roots)
        if broken := checker.prove(describer):
            log.info("store: %s does not fit: %s", variant[-8:], "; ".join(broken[:3]))
            continue
        try:
            return _Loader(store, entry, program, signature, roots, checker).run()
        except StateChanged as why:
            log.info("store: %s does not fit: %s", variant[-8:], why)
        except (Missing, LookupError, ImportError, OSError, AttributeError, TypeError) as why:
            log.warning("store: model %s cannot be used here: %s", variant[:16], why)
    return None


@dataclass
class _Loader(LanesLoader):
    signature: Signature
    roots: Roots
    checker: Checker

    def run(self) -> Dispatch:
        entry = self.entry
        device = common_device((leaf.path, leaf.device) for leaf in self.signature.tensors)
        checks = _Checks(self.checker, device_row(device))
        graphs = [self.graph(each, checks, device) for each in entry["graphs"]]
        nothing: Any = None
        regions = Regions((nothing,) * entry["captures"], array("H"), {}, tuple(entry["refusals"]))
        return self.start(graphs, entry["notes"], self.signature, regions)

    def graph(self, data: Mapping[str, Any], checks: _Checks, device: torch.device) -> Graph:
        owner = self.roots.owner
        where = [(path, holder, name) for path, holder, name in data["bound"]]
        kinds = data["kinds"]

        def fetch() -> list[Any]:
            return [_tensor(owner, *each) for each in where]

        def other_tensors() -> Iterator[str]:
            for place, kind in zip(where, kinds, strict=True):
                path = ".".join(filter(None, (place[0], place[2])))
                try:
                    tensor = _tensor(owner, *place)
                except (AttributeError, LookupError):
                    yield f"there is no {path} any more"
                    continue
                now = tensor_kind(tensor) if torch.is_tensor(tensor) else type(tensor).__name__
                if now != kind:
                    yield f"{path} was {kind}, and is {now}"

        def check() -> bool:
            try:
                now = fetch()
            except (AttributeError, LookupError):
                return False
            return (
                all(map(torch.is_tensor, now))
                and [tensor_kind(tensor) for tensor in now] == kinds
                and checks.facts()
            )

        def explain() -> str:
            return "; ".join([*list(other_tensors())[:5], *checks.explain()])

        return Graph(
            _EMPTY,
            (),
            data["arguments"],
            None,
            ModuleState(owner, fetch, check, checks.rest, explain, checks.facts),
            data["pieces"],
            conditions=self.assumptions(data["conditions"], self.signature),
            unique=tuple(data["unique"]),
            argument_names=[leaf.path for leaf in self.signature.tensors],
            device=device,
            is_loaded=True,
        )


class _Checks:
    """What all graphs that rely on the same facts have checked: these, and settings of torch."""

    def __init__(self, checker: Checker, device: Device) -> None:
        self.checker = checker
        settings = device.settings

        def with_settings() -> tuple[Any, ...]:
            return quick_state() + settings()

        self._now = with_settings if settings() else quick_state
        self._state = self._now()

    def facts(self) -> bool:
        return self._now() == self._state and self.checker.holds()

    def rest(self, _: Any, reads: Reads | None) -> Callable[[], bool]:
        now, state, rest = self._now, self._state, self.checker.rest(reads)
        return lambda: now() == state and rest()

    def explain(self) -> Iterator[str]:
        """What does not hold any more."""
        if changed := self.checker.explain():
            yield changed
        now = self._now()
        names = [*QUICK_STATE, *["a setting of the device"] * (len(now) - len(QUICK_STATE))]
        for name, before, value in zip(names, self._state, now, strict=True):
            if value != before:
                yield f"{name} was {before}, and is {value}"


def _tensor(owner: torch.nn.Module | None, path: str, holder: str, name: str) -> Any:
    module: Any = owner
    for part in path.split(".") if path else ():
        module = module._modules[part]
    return getattr(module, holder)[name]


def start_or(
    program: Program, signature: Signature, roots: Roots, cold: Callable[[], Dispatch]
) -> Dispatch:
    """What serves a signature: from the program's store; else from `cold`, which is kept. Of
    several processes that start at once, one captures and compiles."""
    config, store = program.config, program.store
    fields = None
    describer = Describer()
    if store is not None and config.backend == "inductor":
        fields = model_fields(config, signature, roots, describer)
    if store is None or fields is None:
        with rare_collection():
            return cold()
    key = digest(fields)
    if (found := load(store, key, program, signature, roots, describer)) is not None:
        return found
    with store.lock(key) as is_held:
        if (
            is_held
            and (found := load(store, key, program, signature, roots, describer)) is not None
        ):
            return found
        with rare_collection():
            dispatch = cold()

        def keep(dispatch: Dispatch) -> None:
            save(store, key, fields, dispatch, config, roots)

        dispatch.when_compiled = keep  # with `lazy` or `background` that may be later
        dispatch.report_compiled()
    return dispatch
