"""`compile()`, `CompiledModel`, and the backend for `torch.compile`."""

from __future__ import annotations

import functools
import inspect
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from . import _torch
from .config import Config
from .entry import write_entry
from .errors import (
    ConfigError,
    InvalidDynamicDims,
    SizeNotServed,
    SizeOutOfPlan,
    WrongArguments,
)
from .freed import check_whole
from .graph.capture import Argument, SizeInput, capture
from .graph.facts import Roots
from .graph.pieces import split
from .graph.regions import Regions, cover
from .graph.signature import DynamicDims, Signature
from .lanes import Graph
from .passes.manager import MatchCount
from .program import Program, lanes_of
from .ranges import NOT_SERVED, Plan, Range, align
from .store import open_store
from .store.store import Store
from .warm import start_or


@dataclass(frozen=True)
class Stats:
    """What a compiled model did so far. `print(stats)` shows a table."""

    captures: int = 0
    """Graphs captured; more than one when the model branches on the size."""
    pieces: int = 0
    """Pieces of all graphs, equal ones counted each."""
    unique_pieces: int = 0
    """Pieces that differ: what is compiled, once per range."""
    compilations: int = 0
    """Pieces compiled, ranges counted each, also those that share code."""
    loads: int = 0
    """Compiled pieces taken from the store, ranges counted each."""
    dispatches: dict[Range, int] = field(default_factory=dict)
    """Calls by range."""
    packed_bytes: int = 0
    """Memory of weights in other layouts, beside the module's own."""
    freed_bytes: int = 0
    """Memory of the module's own weights that was given back."""
    eager_calls: int = 0
    """Calls that ran the model itself: size 0, sizes out of plan if allowed, and those of ranges
    that are compiled in the background (which `dispatches` counts too)."""
    failed: dict[Range, str] = field(default_factory=dict)
    """Ranges that could not be compiled in the background, and why; the model serves them."""
    matches: tuple[MatchCount, ...] = ()
    """What the passes matched, by (pass, piece, range)."""
    occurrences: dict[tuple[Range, str], int] = field(default_factory=dict)
    """How often each compiled range calls each piece (by fingerprint)."""

    def matched(self, name: str) -> dict[Range, int]:
        """Matches of a pass by range of the plan, with those of equal pieces counted each. A
        piece whose matches are not known counts as none."""
        counts: dict[Range, int] = {}
        for count in self.matches:
            if count.name == name and count.range in self.dispatches:
                times = self.occurrences.get((count.range, count.piece), 1)
                counts[count.range] = counts.get(count.range, 0) + times * (count.matches or 0)
        return counts

    def __str__(self) -> str:
        rows = [("range", "calls")]
        rows += [(str(range_), str(calls)) for range_, calls in self.dispatches.items()]
        if self.eager_calls:
            rows.append(("eager", str(self.eager_calls)))
        heading = (
            f"{self.captures} captured, {self.pieces} pieces of which {self.unique_pieces} unique, "
            f"{self.compilations} compilations"
        )
        if self.loads:
            heading += f", {self.loads} loaded"
        if self.packed_bytes:
            heading += f", {self.packed_bytes / 2**20:.1f} MiB of packed weights"
        if self.freed_bytes:
            heading += f", {self.freed_bytes / 2**20:.1f} MiB of original weights freed"
        table = align(rows, right={1}) if len(rows) > 1 else []
        by_pass: dict[str, int] = {}
        for count in self.matches:
            by_pass[count.name] = by_pass.get(count.name, 0) + (count.matches or 0)
        failed = [f"{range_} is not compiled: {why}" for range_, why in self.failed.items()]
        passes = [f"pass {name} matched {matches} times" for name, matches in by_pass.items()]
        notes = dict.fromkeys(f"{c.name}: {note}" for c in self.matches for note in c.notes)
        return "\n".join([heading, *table, *failed, *passes, *notes])


class CompiledModel:
    """A module or function that sends each call to the graph of its size's range.

    Everything else is that of the module: `state_dict()`, attributes, `.to()` before the
    first call. Tensors updated in place, and parameters replaced by others of the same
    kind, are followed. For inference: gradients are never recorded.

    The first call captures the model with its arguments and compiles the plan; other calls
    must have the same kinds of arguments, except for the size.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        config: Config,
        dynamic_dims: DynamicDims | None,
    ) -> None:
        own = self.__dict__
        own["module"] = function
        own["config"] = config
        own["_dynamic_dims"] = dynamic_dims
        own["_lock"] = threading.RLock()
        own["_regions"] = None
        own["_program"] = None
        own["_early_eager_calls"] = 0
        own["_call"] = self._first_call
        if not isinstance(function, torch.nn.Module):
            for name in ("__module__", "__name__", "__qualname__", "__doc__"):
                own[name] = getattr(function, name, None)
            own["__wrapped__"] = function  # where inspect.signature looks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model at the size of its arguments.

        Raises:
            InputError: one subclass per way in which the arguments do not fit.
            CaptureError, CompileError, GuardError: at the first call (or, with
                `lazy=True`, at the first call of a range).
            StateChanged: when the module is not as it was at capture.
            WeightsFreed: when weights are needed that `free_original_weights` freed.
        """
        try:
            return self._call(*args, **kwargs)
        except TypeError as error:
            # Without a further frame it was Python that could not bind the arguments.
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                raise WrongArguments(
                    f"the arguments do not fit {inspect.signature(_forward(self.module))}: {error}"
                ) from None
            raise

    # --- what the user reads -----------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan: as configured before the first call, as compiled after it."""
        return self._program.plan if self._program else Plan.from_config(self.config)

    def stats(self) -> Stats:
        """Counters since creation or the last `reset()`."""
        if self._program is None:
            return Stats(eager_calls=self._early_eager_calls)
        lanes = [lane for lane in self._program.lanes if lane]
        graphs = list({id(lane.graph): lane.graph for lane in lanes}.values())
        counts = self._program.counts
        return Stats(
            captures=len(self._regions.captures),
            pieces=sum(graph.piece_count for graph in graphs),
            unique_pieces=len({name for graph in graphs for name in graph.unique}),
            compilations=counts.compilations,
            loads=counts.loads,
            dispatches=self._program.dispatches(),
            packed_bytes=self._program.weights.nbytes,
            freed_bytes=self._program.originals.nbytes,
            eager_calls=counts.eager_calls + self._early_eager_calls,
            failed=self._program.failed(),
            matches=tuple(counts.matches),
            occurrences=dict(
                Counter(
                    (lane.planned.range, step[1].removeprefix("p_"))
                    for lane in lanes
                    if lane.body is not None
                    for step in lane.body.steps
                    if step is not None and step[0] == "piece"
                )
            ),
        )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is compiled in the background any more (`Config.background`); False
        when that takes longer.

        Raises:
            BackgroundError: when some of it failed, each time.
        """
        program = self._program
        return program is None or program.wait(timeout_s)

    def close(self) -> None:
        """Compile nothing more in the background, and wait until the piece that is compiled now
        is done. Calls go on being served by what is there. A program that ends does the same."""
        if self._program is not None:
            self._program.background.close()

    def reset(self) -> None:
        """Forget what was captured and compiled; the next call starts anew."""
        self.close()
        with self._lock:
            self.__dict__.update(
                _program=None, _regions=None, _early_eager_calls=0, _call=self._first_call
            )

    def __repr__(self) -> str:
        name = getattr(self.module, "__qualname__", type(self.module).__name__)
        state = "compiled" if self._program else "not called yet"
        return f"<splitpoint.CompiledModel of {name}, {state}, {len(self.plan.ranges)} ranges>"

    # --- the module --------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["module"], name)
        if getattr(value, "__self__", None) is not self.module or not callable(value):
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is self.module else result  # .to(), .eval(), ...

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.module)})

    # --- the first call ----------------------------------------------------------------

    def _first_call(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if self._program is None:
                signature = Signature(_forward(self.module), args, kwargs, self._dynamic_dims)
                if signature.size == 0:  # nothing to capture from, and nothing to gain
                    self.__dict__["_early_eager_calls"] += 1
                    return self.module(*args, **kwargs)
                if signature.size > self.config.max_size:
                    return self._out_of_plan(signature.size, args, kwargs)
                self._start(signature)
        return self._call(*args, **kwargs)

    def _start(self, signature: Signature) -> None:
        store = open_store(self.config)
        roots = _roots(self.module)
        check_whole(roots.owner)
        program, regions = start_or(
            self.config, store, signature, roots, lambda: self._compile(signature, store)
        )
        program.free_originals()
        entry = write_entry(signature, program, self._not_served)
        self.__dict__.update(_program=program, _regions=regions, _call=entry)

    def _compile(self, signature: Signature, store: Store | None) -> tuple[Program, Regions]:
        config = self.config
        regions = cover(
            functools.partial(capture, self.module, signature), signature.size, config.max_size
        )
        graphs = [
            Graph(
                split(captured.graph_module, config.splitting_ops, captured.symbols),
                captured.inputs,
                len(signature.tensors),
                (captured.result_leaves, captured.result_spec),
                captured.fetch,
                captured.held,
                captured.check,
                captured.check_rest,
                captured.owner,
                captured.explain,
            )
            for captured in regions.captures
        ]
        lanes = lanes_of(config, regions.owner, graphs, regions.boundaries)
        notes = [*Plan.from_config(config).notes, *(f"refused: {r}" for r in regions.refusals)]
        program = Program(config, lanes, notes, store, _stand_in(self.module, signature))
        if not config.lazy:
            program.compile_all()
        return program, regions

    # --- sizes without a lane ----------------------------------------------------------

    def _not_served(self, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if size == 0:
            self._program.counts.eager_calls += 1
            return self.module(*args, **kwargs)
        if size > self.config.max_size:
            return self._out_of_plan(size, args, kwargs)
        regions: Regions = self._regions
        raise SizeNotServed(
            f"size {size} is refused by the model itself: {'; '.join(regions.refusals)}"
        )

    def _out_of_plan(self, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.config.on_out_of_plan == "eager":
            if self._program is None:
                self.__dict__["_early_eager_calls"] += 1
            else:
                self._program.counts.eager_calls += 1
            return self.module(*args, **kwargs)
        raise SizeOutOfPlan(
            f"size {size} is outside the plan's [1,{self.config.max_size}]: raise max_size, split "
            f"the batch, or set on_out_of_plan='eager'"
        )


def compile(
    module: Callable[..., Any],
    config: Config | None = None,
    *,
    dynamic_dims: DynamicDims | None = None,
) -> CompiledModel:
    """Compile a module or function once per range of sizes.

    Args:
        module: an `nn.Module`, a bound method of one, or a function, for inference. Nothing
            is done to it until the first call.
        config: the ranges and what they are given. Default: one range, [1,8192].
        dynamic_dims: for each argument that depends on the size its dimension, such as
            `{"input_ids": 1}`; several as a tuple; None for an integer argument that is the
            size itself. Arguments are named as in the signature; a name stands for all
            tensors in a container, `batch['ids']` for one. Default: dimension 0 of every
            tensor argument.

    Returns:
        A callable with the module's signature, attributes and results.

    Raises:
        ConfigError: when `config` is not a `Config`.
    """
    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"config must be a splitpoint.Config, got {type(config).__name__}: write "
            f"Config(split_points=[...], ...), or Config.from_dict(...)"
        )
    if isinstance(module, CompiledModel):
        raise ConfigError("this model is compiled already: pass its .module to compile it anew")
    if not callable(module):
        raise ConfigError(f"expected a module or function, got {module!r}")
    config = config or Config()
    _check_options(config)
    return CompiledModel(module, config, dynamic_dims)


def signature_of(
    module: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_dims: DynamicDims | None,
) -> Signature:
    """What a first call with these arguments would fix."""
    return Signature(_forward(module), args, kwargs, dynamic_dims)


def _roots(function: Callable[..., Any]) -> Roots:
    """Where what a capture reads is looked up."""
    owner = function if isinstance(function, torch.nn.Module) else None
    if owner is None:
        bound_to = getattr(function, "__self__", None)
        owner = bound_to if isinstance(bound_to, torch.nn.Module) else None
    return Roots(owner, _forward(function))


def dynamo_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend behind `torch.compile(module, backend="splitpoint", options={...})`.

    Options are the fields of `Config`. Dynamo keeps its own guards and calls; it decides
    what is dynamic (`torch._dynamo.mark_dynamic`), and a graph may have one dynamic size.
    A graph without one is compiled as it is, for its one size.

    Raises:
        ConfigError: for options that are none of `Config`'s.
        InvalidDynamicDims: when the graph has two independent dynamic sizes, or none of its
            inputs has the size itself.
    """
    config = Config.from_dict(options or {})
    if config.background:
        raise ConfigError(
            "background=True is not for torch.compile, which refuses to run its functions while "
            "another thread traces: call splitpoint.compile(module, Config(...)) instead"
        )
    if config.free_original_weights:
        raise ConfigError(
            "free_original_weights=True is not for torch.compile, which passes the weights at each "
            "call: call splitpoint.compile(module, Config(...)) instead"
        )
    _check_options(config)
    # Parameters may arrive with requires_grad; inputs of the pieces never do.
    values = [
        node.meta["example_value"] for node in graph_module.graph.find_nodes(op="placeholder")
    ]
    symbols = dict.fromkeys(_torch.symbols_in(values), _torch.size_symbol())
    if len(symbols) > 1:
        raise InvalidDynamicDims(
            f"the graph has {len(symbols)} dynamic sizes "
            f"({', '.join(sorted(map(str, symbols)))}), but ranges are over one: mark the "
            f"one with torch._dynamo.mark_dynamic and leave dynamic=None"
        )
    inputs = [
        SizeInput() if isinstance(value, torch.SymInt) else Argument(index)
        for index, value in enumerate(values)
    ]
    graph = Graph(split(graph_module, config.splitting_ops, symbols), inputs, len(values))
    try:
        find = _torch.size_finder(values, symbols)
    except LookupError:
        raise InvalidDynamicDims(
            "no input of the graph is the dynamic size or has it as a dimension of its own: mark "
            "the dimension itself with torch._dynamo.mark_dynamic, before what follows from it"
        ) from None
    if find is None:
        config = replace(config, max_size=1, split_points=(), compile_sizes=())
    owner = array("H", [0]) + array("H", [1]) * config.max_size
    program = Program(config, lanes_of(config, owner, [graph], {}), store=open_store(config))
    if not config.lazy:
        program.compile_all()
    table, runners, calls, max_size = program.table, program.runners, program.calls, config.max_size
    eager = graph_module.forward

    def run(*args: Any) -> Any:
        size = 1 if find is None else find(args)
        index = table[size] if size <= max_size else NOT_SERVED
        if index == NOT_SERVED:
            if size == 0 or config.on_out_of_plan == "eager":
                return eager(*args)
            raise SizeOutOfPlan(
                f"size {size} is outside the plan's [1,{max_size}]: raise max_size, or set "
                f"on_out_of_plan='eager'"
            )
        calls[index] += 1
        with torch.no_grad():
            return runners[index](size, *args)

    return run


def _stand_in(module: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """The module itself, called as a stitched function is."""

    def run(size: int, *tensors: Any) -> Any:
        args, kwargs = signature.with_tensors(size, tensors)
        return module(*args, **kwargs)

    return run


def _check_options(config: Config) -> None:
    if config.backend == "inductor" and config.inductor_options:
        from .compilers.inductor import check_options

        for planned in Plan.from_config(config).entries:
            check_options(dict(planned.options))


def _forward(module: Callable[..., Any]) -> Callable[..., Any]:
    return module.forward if isinstance(module, torch.nn.Module) else module
