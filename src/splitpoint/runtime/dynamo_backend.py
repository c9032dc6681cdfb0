"""One graph that Dynamo found, compiled for the ranges of its size; the backend `splitpoint`."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..capture.sources import Argument, SizeInput
from ..config import Config
from ..errors import ConfigError, InvalidDynamicDims, SizeOutOfPlan
from ..graph.pieces import split
from ..ranges import NOT_SERVED
from ..store import open_store
from ..torch_internals.sizes import Place, size_finder, size_place, size_symbol, symbols_in
from .dispatch import Dispatch
from .lanes import Graph
from .plan_lanes import lanes_of
from .program import Program


def dynamo_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind `torch.compile(module, backend="splitpoint", options={...})`.

    Options are the fields of `Config`. Dynamo keeps its own guards and calls; it decides
    what is dynamic (`torch._dynamo.mark_dynamic`), and a graph may have one dynamic size.
    A graph without one is compiled as it is, for its one size.

    Raises:
        ConfigError: for options that are none of `Config`'s, and for modes of torch.compile other
            than "default".
        InvalidDynamicDims: when the graph has two independent dynamic sizes, or none of its
            inputs has the size itself.
    """
    if mode not in (None, "default"):
        raise ConfigError(
            f"mode={mode!r} is Inductor's own: leave it out, and say what is wanted by options, "
            f"such as {{'inductor_options': {{'max_autotune': True}}}}"
        )
    config = Config.from_dict(options or {})
    if config.background:
        raise ConfigError(
            "background=True is not for torch.compile, which refuses to run its functions while "
            "another thread traces: call splitpoint.compile(module, Config(...)) instead"
        )
    for name in ("free_original_weights", "mmap_packed_weights"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}=True is not for torch.compile, which passes the weights at each call: "
                f"call splitpoint.compile(module, Config(...)) instead"
            )
    check_options(config)
    return part_of(graph_module, config).run


@dataclass(frozen=True)
class Part:
    """One of Dynamo's graphs, compiled for the ranges of its size."""

    run: Callable[..., Any]
    """What Dynamo calls."""
    program: Program
    place: Place | None
    """Where a call's arguments hold the size; None for a graph of one size."""

    @staticmethod
    def of(
        program: Program,
        dispatch: Dispatch,
        place: Place | None,
        eager: Callable[..., Any] | None = None,
    ) -> Part:
        """What a program serves; `eager` runs the graph itself, where there is one."""
        return Part(_runner(program, dispatch, size_finder(place), eager), program, place)


def part_of(graph_module: fx.GraphModule, config: Config) -> Part:
    """One of Dynamo's graphs, for the ranges of a configuration.

    Raises:
        InvalidDynamicDims: as `dynamo_backend`.
    """
    # Parameters may arrive with requires_grad; inputs of the pieces never do.
    values = [
        node.meta["example_value"] for node in graph_module.graph.find_nodes(op="placeholder")
    ]
    symbols = dict.fromkeys(symbols_in(values), size_symbol())
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
    parts = split(graph_module, config.splitting_ops, symbols)
    graph = Graph(parts, inputs, len(values), argument_names=parts.inputs)
    try:
        place = size_place(values, symbols)
    except LookupError:
        raise InvalidDynamicDims(
            "no input of the graph is the dynamic size or has it as a dimension of its own: mark "
            "the dimension itself with torch._dynamo.mark_dynamic, before what follows from it"
        ) from None
    if place is None:
        config = replace(config, max_size=1, split_points=(), compile_sizes=())
    owner = array("H", [0]) + array("H", [1]) * config.max_size
    program = Program(config, open_store(config))
    dispatch = program.add(lanes_of(config, owner, [graph], {}))
    if not config.lazy:
        program.compile_all()
    return Part.of(program, dispatch, place, graph_module.forward)


def _runner(
    program: Program,
    dispatch: Dispatch,
    find: Callable[[Sequence[Any]], int],
    eager: Callable[..., Any] | None,
) -> Callable[..., Any]:
    table, runners, calls = dispatch.table, program.runners, program.calls
    max_size = program.config.max_size
    may_be_eager = program.config.on_out_of_plan == "eager"

    def run(*args: Any) -> Any:
        size = find(args)
        index = table[size] if size <= max_size else NOT_SERVED
        if index == NOT_SERVED:
            if eager is not None and (size == 0 or may_be_eager):
                return eager(*args)
            raise SizeOutOfPlan(
                f"size {size} is outside the plan's [1,{max_size}]: raise max_size, or set "
                f"on_out_of_plan='eager'"
            )
        calls[index] += 1
        with torch.no_grad():
            return runners[index](size, *args)

    return run


def check_options(config: Config) -> None:
    """Refuse options that Inductor does not have.

    Raises:
        UnknownInductorOption: for the first of them.
    """
    if config.backend == "inductor" and config.inductor_options:
        from ..compilers.inductor import check_options

        for planned in config.plan().entries:
            check_options(dict(planned.options))
