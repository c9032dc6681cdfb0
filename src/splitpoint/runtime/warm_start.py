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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..capture.assumptions import Assumption, runs
from ..capture.facts import Checker, Describer, Facts, Roots, Unprovable, collect
from ..capture.module_state import ModuleState
from ..capture.reads import Reads
from ..capture.regions import Regions
from ..capture.signature import Signature
from ..capture.watch import CheckRest
from ..compilers.artifact import Libraries, Missing, objects_of
from ..compilers.wrapper import Wrapper
from ..config import Config
from ..errors import KernelBuildError, StateChanged
from ..graph.overlap import Updates
from ..graph.pieces import Split
from ..graph.stitch import Body, PieceSteps
from ..kernels.devices import Device, common_device, device_row
from ..passes.manager import MatchCount
from ..ranges import Plan
from ..store.constants import NotKept, decode, encode
from ..store.key import digest
from ..store.store import Store
from ..torch_internals.generated_code import kernel_place
from ..torch_internals.guard_expressions import NotPortable
from ..torch_internals.onednn import onednn_linear_op
from ..torch_internals.state import quick_state
from .dispatch import Dispatch
from .garbage import no_collection, rare_collection
from .lanes import Graph, Lane
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
    pieces: dict[str, Any] = {}
    rows = []
    for lane in lanes:
        body = lane.body
        if body is None:
            raise NotKept(f"{lane.planned.range}, which is not compiled yet")
        names: dict[str, Any] = {}
        for name, value in body.names.items():
            if name.startswith("__") or name == "stitched":
                continue
            if not name.startswith("p_"):
                names[name] = encode(value)
                continue
            piece = lane.artifacts.get(name[2:])
            kept = store.read("pieces", piece) if piece else None
            if piece is None or kept is None:
                raise NotKept(f"a piece that is not kept ({name[2:]} of {lane.planned.range})")
            pieces[piece] = {
                field: kept[field]
                for field in ("source", "operators", "kernels", "matches", "steps")
            }
            names[name] = ["piece", piece]
        rows.append(
            {
                "graph": graphs.index(lane.graph),
                "sizes": [list(run) for run in runs(lane.sizes)],
                "parameters": list(body.parameters),
                "lines": list(body.lines),
                "steps": list(body.steps),
                "names": names,
                "packed": [list(each) for each in body.packed],
                "kernels": {str(s): name for s, name in (lane.kernels or {}).items()},
                "assumptions": [[a.code, a.origin] for a in lane.assumptions],
                "updates": body.updates and body.updates.to_json(),
            }
        )
    libraries = objects_of(at for piece in pieces.values() for at in piece["kernels"].values())
    path = kernels.loaded_library()
    library = store.write_object(path.read_bytes()) if path is not None else None
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
        "plan": Plan(config.max_size, tuple(lane.planned for lane in lanes)).to_json(),
        "lanes": rows,
        "pieces": pieces,
        "notes": list(dispatch.notes),
        "refusals": list(regions.refusals),
        "captures": len(regions.captures),
        "library": library,
        "objects": sorted(libraries | ({library} if library else set())),
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
class _Loader:
    store: Store
    entry: Mapping[str, Any]
    program: Program
    signature: Signature
    roots: Roots
    checker: Checker
    libraries: Libraries = field(default_factory=Libraries)

    def run(self) -> Dispatch:
        entry = self.entry
        calls = self.pieces()
        device = common_device((leaf.path, leaf.device) for leaf in self.signature.tensors)
        shared = _checks_of(self.checker, device_row(device))
        graphs = [self.graph(each, *shared, device) for each in entry["graphs"]]
        plan = Plan.from_json(entry["plan"])
        lanes = []
        bodies = []
        for planned, row in zip(plan.entries, entry["lanes"], strict=True):
            sizes = [s for first, last in row["sizes"] for s in range(first, last + 1)]
            lane = Lane(planned, graphs[row["graph"]], sizes, kernels={})
            lane.assumptions = self.assumptions(row["assumptions"])
            lanes.append(lane)
            names = {
                name: calls[value[1]] if value[0] == "piece" else decode(value)
                for name, value in row["names"].items()
            }
            packed = tuple((index, layout) for index, layout in row["packed"])
            text = tuple(row["parameters"]), tuple(row["lines"])
            updates = Updates.from_json(row["updates"]) if row["updates"] else None
            bodies.append(Body(*text, names, packed, tuple(row["steps"]), self.steps(row), updates))
        nothing: Any = None
        regions = Regions((nothing,) * entry["captures"], array("H"), {}, tuple(entry["refusals"]))
        dispatch = self.program.add(lanes, entry["notes"], self.signature, regions)
        try:
            self.program.start(dispatch, bodies)
        except BaseException:
            self.program.drop(dispatch)
            raise
        self.count(plan)
        return dispatch

    def count(self, plan: Plan) -> None:
        counts = self.program.counts
        for planned, row in zip(plan.entries, self.entry["lanes"], strict=True):
            for name, value in row["names"].items():
                if value[0] == "piece":
                    counts.loads += 1
                    counts.note(
                        MatchCount.from_kept(kept, name[2:], planned.range)
                        for kept in self.entry["pieces"][value[1]]["matches"]
                    )

    def pieces(self) -> dict[str, Callable[..., Any]]:
        """The compiled pieces by key."""
        pieces = self.entry["pieces"]
        operators = {op for piece in pieces.values() for op in piece["operators"].values()}
        if (own := self.entry["library"]) is not None:
            try:
                kernels.load_from(self.library(own))
            except KernelBuildError as error:
                raise Missing(str(error)) from error
        if any(op.startswith("splitpoint_onednn::") for op in operators):
            _onednn()
        found = {}
        for key, piece in pieces.items():
            wrapper = Wrapper(piece["source"], tuple(piece["kernels"]), piece["operators"])
            # Pieces on other devices than CPU have no steps.
            native = self.program.config.runner == "native" and piece["steps"]
            bind = wrapper.bind_when_called if native else wrapper.bind
            found[key] = bind({name: self.kernel(at) for name, at in piece["kernels"].items()})
        return found

    def steps(self, row: Mapping[str, Any]) -> dict[str, PieceSteps]:
        """What the pieces of a lane do, by name, where the runner can do it."""
        found = {}
        for name, value in row["names"].items():
            if value[0] == "piece" and (steps := self.entry["pieces"][value[1]]["steps"]):
                kernels_ = self.entry["pieces"][value[1]]["kernels"]
                found[name] = self.piece_steps(steps, kernels_)
        return found

    def piece_steps(self, steps: Mapping[str, Any], at: Mapping[str, Sequence[Any]]) -> PieceSteps:
        called = [self.kernel(at[name]) for name in steps["kernels"]]
        return PieceSteps(steps, lambda: [kernel_place(each) for each in called])

    def kernel(self, at: Sequence[Any]) -> Callable[..., Any]:
        return self.libraries.kernel(self.store, *at)

    def library(self, digest_: str) -> Path:
        path = self.store.library(digest_)
        if path is None:
            raise Missing(f"the library {digest_} is not there")
        return path

    def graph(
        self,
        data: Mapping[str, Any],
        check_facts: Callable[[], bool],
        check_rest: CheckRest,
        device: torch.device,
    ) -> Graph:
        owner, checker = self.roots.owner, self.checker
        where = [(path, holder, name) for path, holder, name in data["bound"]]
        kinds = data["kinds"]

        def fetch() -> list[Any]:
            return [_tensor(owner, *each) for each in where]

        def check() -> bool:
            try:
                now = fetch()
            except (AttributeError, LookupError):
                return False
            return (
                all(map(torch.is_tensor, now))
                and [tensor_kind(tensor) for tensor in now] == kinds
                and check_facts()
            )

        return Graph(
            _EMPTY,
            (),
            data["arguments"],
            None,
            ModuleState(owner, fetch, check, check_rest, checker.explain, check_facts),
            data["pieces"],
            conditions=self.assumptions(data["conditions"]),
            unique=tuple(data["unique"]),
            argument_names=[leaf.path for leaf in self.signature.tensors],
            device=device,
            is_loaded=True,
        )

    def assumptions(self, kept: Sequence[Sequence[str]]) -> tuple[Assumption, ...]:
        names = self.signature.dims.names
        return tuple(Assumption(code, origin, names) for code, origin in kept)


def _checks_of(checker: Checker, device: Device) -> tuple[Callable[[], bool], CheckRest]:
    """`ModuleState.check_facts` and `.check_rest` of all graphs that rely on these facts."""
    settings = device.settings

    def with_settings() -> tuple[Any, ...]:
        return quick_state() + settings()

    now = with_settings if settings() else quick_state
    state = now()

    def check_facts() -> bool:
        return now() == state and checker.holds()

    def check_rest(_: Any, reads: Reads | None) -> Callable[[], bool]:
        rest = checker.rest(reads)
        return lambda: now() == state and rest()

    return check_facts, check_rest


def _onednn() -> None:

    onednn_linear_op()


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
