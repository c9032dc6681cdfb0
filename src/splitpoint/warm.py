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

from . import _torch_wrapper, kernels
from ._torch_guards import NotPortable
from .compilers.wrapper import Wrapper
from .config import Config
from .errors import KernelBuildError, PassError
from .garbage import no_collection, rare_collection
from .graph.assumptions import runs
from .graph.capture import held
from .graph.facts import Checker, Describer, Facts, Roots, Unprovable, collect
from .graph.pieces import Split
from .graph.reads import Reads
from .graph.regions import Regions
from .graph.signature import ConstantLeaf, Signature, SizeLeaf, TensorLeaf
from .graph.stitch import Body, PieceSteps
from .lanes import Graph, Lane
from .module_watch import CheckRest
from .passes.manager import MatchCount
from .program import Program
from .ranges import Plan
from .store.artifact import Libraries, Missing
from .store.code import short
from .store.constants import NotKept, decode, encode
from .store.key import digest, environment
from .store.store import Store

log = logging.getLogger("splitpoint")

KIND = "models"

MOST_VARIANTS = 8
"""Manifests of one key (states of a module that are not part of it) that are tried."""

_EMPTY = Split((), (), (), {})


# --- the key ---------------------------------------------------------------------------


def model_fields(
    config: Config, signature: Signature, roots: Roots, describer: Describer
) -> dict[str, str] | None:
    """What a program's key is made from; None when it cannot be kept, which the log says."""
    try:
        arguments = [_leaf(leaf, describer) for leaf in signature.leaves]
        return {
            **environment(),
            "model": _structure(roots, describer),
            "arguments": json.dumps([_parameters(signature), str(signature.spec), arguments]),
            "max_size": str(config.max_size),
            "split_points": str(list(config.split_points)),
            "compile_sizes": str(list(config.compile_sizes)),
            "splitting_ops": str(list(config.splitting_ops)),
            "on_guard": config.on_guard,
            "hint": config.hint,
            "inductor_options": json.dumps(
                {k: dict(v) if isinstance(v, Mapping) else v for k, v in _options(config)},
                sort_keys=True,
            ),
            "passes": json.dumps([each.uuid() for each in config.passes]),
            "linear": _by_range(config.linear),
            "attention": _by_range(config.attention),
            "max_packed_bytes": str(config.max_packed_bytes),
            "free_original_weights": str(config.free_original_weights),
        }
    except (Unprovable, TypeError, PassError) as why:
        log.info("store: the model is not kept: %s", why)
        return None


def _options(config: Config) -> list[tuple[str, Any]]:
    return sorted(config.inductor_options.items())


def _by_range(given: str | Mapping[str, str]) -> str:
    # A mapping in order: the first that fits counts.
    return given if isinstance(given, str) else str(list(given.items()))


def _parameters(signature: Signature) -> list[list[str]]:
    return [[name, str(p.kind)] for name, p in signature.parameters.parameters.items()]


def _leaf(leaf: TensorLeaf | SizeLeaf | ConstantLeaf, describer: Describer) -> Any:
    if isinstance(leaf, ConstantLeaf):
        return [leaf.path, describer.describe(leaf.value)]
    if isinstance(leaf, SizeLeaf):
        return [leaf.path, "size"]
    shape = ["size" if dim in leaf.dims else n for dim, n in enumerate(leaf.shape)]
    strides = [list(leaf.stride_at(dim)) for dim in range(len(leaf.shape))]
    return [leaf.path, str(leaf.dtype), str(leaf.device), shape, strides]


def _structure(roots: Roots, describer: Describer) -> str:
    """A digest of a module tree: classes, their code, and the kinds of tensors."""
    rows: list[str] = []
    if roots.owner is None or not isinstance(roots.owner, torch.nn.Module):
        return short(json.dumps(describer.describe(roots.function)))
    rows.append(getattr(roots.function, "__name__", ""))
    seen: dict[int, int] = {}
    classes: dict[type, str] = {}

    def visit(module: torch.nn.Module, path: str) -> None:
        kind = type(module)
        if kind not in classes:
            classes[kind] = json.dumps(describer.describe(kind))
        rows.append(f"{path} {classes[kind]}")
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                rows.append(f"{path}.{name} {_meta(tensor, seen)}")
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{path}.{name}")

    visit(roots.owner, "")
    return short("\n".join(rows))


def _meta(tensor: torch.Tensor | None, seen: dict[int, int]) -> str:
    if tensor is None:
        return "None"
    alias = seen.setdefault(_torch_wrapper.memory_of(tensor), len(seen))
    return f"{tensor_kind(tensor)} {alias}"


def tensor_kind(tensor: torch.Tensor) -> str:
    """What compiled code relies on of a tensor of the module."""
    return (
        f"{type(tensor).__qualname__} {tensor.dtype} {tensor.device} {tuple(tensor.shape)} "
        f"{tensor.stride() if tensor.layout is torch.strided else tensor.layout} "
        f"{tensor.requires_grad}"
    )


# --- keeping ---------------------------------------------------------------------------


def save(
    store: Store,
    key: str,
    fields: Mapping[str, str],
    program: Program,
    regions: Regions,
    roots: Roots,
) -> bool:
    """Keep a program whose lanes are all compiled; False, with a line in the log, when it
    cannot be kept."""
    try:
        entry = _entry(store, program, regions, roots)
        # What was read for the entry is to be what was compiled.
        with torch.no_grad():  # as it was at capture
            unchanged = all(captured.check() for captured in regions.captures)
        if not unchanged:
            raise NotKept("a module that changed since it was captured")
    except (NotKept, NotPortable, Unprovable) as why:
        log.info("store: the program is not kept: it has %s", why)
        return False
    entry["fields"] = dict(fields)
    variant = hashlib.sha256(json.dumps(entry["facts"], sort_keys=True).encode()).hexdigest()[:8]
    return store.write(KIND, f"{key}-{variant}", entry)


def _entry(store: Store, program: Program, regions: Regions, roots: Roots) -> dict[str, Any]:
    lanes = [lane for lane in program.lanes if lane is not None]
    graphs = list({id(lane.graph): lane.graph for lane in lanes}.values())
    describer = Describer()
    expressions: dict[str, None] = {}
    traced: list[Any] = []
    for captured in regions.captures:
        expressions |= captured.read(set(map(id, captured.fetch())))
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
            }
        )
    libraries = {each for piece in pieces.values() for each, _ in piece["kernels"].values()}
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
            }
            for graph in graphs
        ],
        "plan": Plan(program.config.max_size, tuple(lane.planned for lane in lanes)).to_json(),
        "lanes": rows,
        "pieces": pieces,
        "notes": list(program.notes),
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
    store: Store, key: str, config: Config, roots: Roots, describer: Describer
) -> tuple[Program, Regions] | None:
    """The program of a key, ready to run, or None when the store has none that fits."""
    with no_collection():
        return _load(store, key, config, roots, describer)


def _load(
    store: Store, key: str, config: Config, roots: Roots, describer: Describer
) -> tuple[Program, Regions] | None:
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
            return _Loader(store, entry, config, roots, checker).run()
        except (Missing, LookupError, ImportError, OSError, AttributeError, TypeError) as why:
            log.warning("store: model %s cannot be used here: %s", variant[:16], why)
    return None


@dataclass
class _Loader:
    store: Store
    entry: Mapping[str, Any]
    config: Config
    roots: Roots
    checker: Checker
    libraries: Libraries = field(default_factory=Libraries)

    def run(self) -> tuple[Program, Regions]:
        entry = self.entry
        calls = self.pieces()
        shared = _checks_of(self.checker)
        graphs = [self.graph(each, *shared) for each in entry["graphs"]]
        plan = Plan.from_json(entry["plan"])
        lanes = []
        bodies = []
        for planned, row in zip(plan.entries, entry["lanes"], strict=True):
            sizes = [s for first, last in row["sizes"] for s in range(first, last + 1)]
            lanes.append(Lane(planned, graphs[row["graph"]], sizes, kernels={}))
            names = {
                name: calls[value[1]] if value[0] == "piece" else decode(value)
                for name, value in row["names"].items()
            }
            packed = tuple((index, layout) for index, layout in row["packed"])
            text = tuple(row["parameters"]), tuple(row["lines"])
            bodies.append(Body(*text, names, packed, tuple(row["steps"]), self.steps(row)))
        program = Program(self.config, lanes, entry["notes"], self.store)
        program.start(bodies)
        self.count(program, plan)
        nothing: Any = None
        regions = Regions((nothing,) * entry["captures"], array("H"), {}, tuple(entry["refusals"]))
        return program, regions

    def count(self, program: Program, plan: Plan) -> None:
        for planned, row in zip(plan.entries, self.entry["lanes"], strict=True):
            for name, value in row["names"].items():
                if value[0] == "piece":
                    program.counts.loads += 1
                    program.counts.matches += [
                        MatchCount.from_kept(kept, name[2:], planned.range)
                        for kept in self.entry["pieces"][value[1]]["matches"]
                    ]

    def pieces(self) -> dict[str, Callable[..., Any]]:
        """The compiled pieces by key."""
        pieces = self.entry["pieces"]
        operators = {op for piece in pieces.values() for op in piece["operators"].values()}
        if (own := self.entry["library"]) is not None:
            try:
                kernels.load_from(self.object(own))
            except KernelBuildError as error:
                raise Missing(str(error)) from error
        if any(op.startswith("splitpoint_onednn::") for op in operators):
            _onednn()
        found = {}
        for key, piece in pieces.items():
            wrapper = Wrapper(piece["source"], tuple(piece["kernels"]), piece["operators"])
            native = self.config.runner == "native" and piece["steps"]
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

    def piece_steps(self, steps: Mapping[str, Any], at: Mapping[str, Sequence[str]]) -> PieceSteps:
        called = [self.kernel(at[name]) for name in steps["kernels"]]
        return PieceSteps(steps, lambda: [_torch_wrapper.kernel_place(each) for each in called])

    def kernel(self, at: Sequence[str]) -> Callable[..., Any]:
        return self.libraries.kernel(self.store, *at)

    def object(self, digest_: str) -> Path:
        path = self.store.object(digest_)
        if path is None:
            raise Missing(f"the library {digest_} is not there")
        return path

    def graph(
        self, data: Mapping[str, Any], check_facts: Callable[[], bool], check_rest: CheckRest
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

        def explain() -> str:
            return checker.explain()

        return Graph(
            _EMPTY,
            (),
            data["arguments"],
            None,
            fetch,
            lambda tensors: held(owner, tensors),
            check,
            check_rest,
            owner,
            explain,
            piece_count=data["pieces"],
            unique=tuple(data["unique"]),
            check_facts=check_facts,
        )


def _checks_of(checker: Checker) -> tuple[Callable[[], bool], CheckRest]:
    """`Graph.check_facts` and `Graph.check_rest` of all graphs that rely on these facts."""
    state = _torch_wrapper.quick_state()

    def check_facts() -> bool:
        return _torch_wrapper.quick_state() == state and checker.holds()

    def check_rest(_: Any, tensors: Any, reads: Reads | None) -> Callable[[], bool]:
        rest = checker.rest(reads)
        return lambda: _torch_wrapper.quick_state() == state and rest()

    return check_facts, check_rest


def _onednn() -> None:
    from . import _torch

    _torch.onednn_linear_op()


def _tensor(owner: torch.nn.Module | None, path: str, holder: str, name: str) -> Any:
    module: Any = owner
    for part in path.split(".") if path else ():
        module = module._modules[part]
    return getattr(module, holder)[name]


def start_or(
    config: Config,
    store: Store | None,
    signature: Signature,
    roots: Roots,
    cold: Callable[[], tuple[Program, Regions]],
) -> tuple[Program, Regions]:
    """A program from the store; else from `cold`, which is kept. Of several processes that
    start at once, one captures and compiles."""
    fields = None
    describer = Describer()
    if store is not None and config.backend == "inductor":
        fields = model_fields(config, signature, roots, describer)
    if store is None or fields is None:
        with rare_collection():
            return cold()
    key = digest(fields)
    if (found := load(store, key, config, roots, describer)) is not None:
        return found
    with store.lock(key) as is_held:
        if is_held and (found := load(store, key, config, roots, describer)) is not None:
            return found
        with rare_collection():
            program, regions = cold()

        def keep(program: Program) -> None:
            save(store, key, fields, program, regions, roots)

        program.when_compiled = keep  # with `lazy` or `background` that may be later
        program.report_compiled()
    return program, regions
