"""The lanes of a plan: each of its ranges over the graphs that serve its sizes."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..capture.assumptions import Assumption, runs
from ..capture.dims import Dims, Lengths
from ..config import Config
from ..errors import GuardError, InvalidDynamicDims
from ..ranges import NOT_SERVED, PlannedRange, Range
from .lanes import Graph, Lane


def lanes_of(
    config: Config,
    owner: array[int],
    graphs: Sequence[Graph],
    boundaries: dict[int, str],
) -> list[Lane]:
    """The lanes of a configuration's plan over one or more graphs.

    A range whose sizes belong to different graphs falls into one lane a graph; sizes with
    no graph belong to no lane.

    Raises:
        GuardError: when a range falls apart and `on_guard` is "error".
    """
    plan = config.plan()
    sizes_of: dict[int, list[int]] = {index: [] for index in range(1, len(plan.entries) + 1)}
    for size, index in enumerate(plan.table):
        if index != NOT_SERVED:
            sizes_of[index].append(size)
    lanes = []
    for index, entry in enumerate(plan.entries, 1):
        by_graph: dict[int, list[int]] = {}
        for size in sizes_of[index]:
            by_graph.setdefault(owner[size], []).append(size)
        if len(by_graph) > 1 and config.on_guard == "error":
            at = next(size for size in sizes_of[index][1:] if size in boundaries)
            raise GuardError(
                f"one graph cannot serve {entry.range}: {boundaries[at]}. {mend(config, at - 1)}"
            )
        for graph, sizes in sorted(by_graph.items()):
            if graph == 0:
                continue  # refused by the model, which the plan's notes say
            if len(by_graph) > 1 or not _has_one_owner(entry.range, owner):
                planned = _part_of(config, entry, sizes, boundaries)
            else:
                planned = entry
            lanes.append(Lane(planned, graphs[graph - 1], sizes))
    return lanes


def mend(config: Config, point: int) -> str:
    """What to do about a graph that is valid up to a size only."""
    if config.batch_invariant:
        return "batch_invariant=True needs one graph for all sizes: leave it out"
    return f"Put a split point at {point}" + (
        ", or set on_guard='split'" if config.on_guard == "error" else ""
    )


def lanes_of_lengths(
    config: Config, dims: Dims, graphs: Sequence[Graph], first: Lengths
) -> list[Lane]:
    """The lanes of a configuration's plan over several dimensions: for each range those of the
    graphs that serve some calls whose sizes are in it, as far as samples show.

    Raises:
        InvalidDynamicDims: for `compile_sizes` that are no lengths of these dimensions, and with
            `batch_invariant`: lengths of 1 have graphs of their own, and so other code.
    """
    if config.batch_invariant:
        raise InvalidDynamicDims(
            f"batch_invariant=True is for one dynamic dimension, got {', '.join(dims.names)}: "
            f"leave it out"
        )
    if config.single_sizes:
        raise InvalidDynamicDims(
            f"compile_sizes has {config.single_sizes[0]}, but {len(dims.names)} dimensions change: "
            f"write the length of each of {', '.join(dims.names)}"
        )
    lanes = []
    for shape in config.compile_shapes:
        if len(shape) != len(dims.names):
            raise InvalidDynamicDims(
                f"compile_sizes has {shape}, but {len(dims.names)} dimensions change: write the "
                f"length of each of {', '.join(dims.names)}"
            )
        graph = next((graph for graph in graphs if graph.serves(shape)), None)
        if graph is not None:
            lanes.append(exact_lane(config, dims, graph, shape))
    for entry in config.plan().entries:
        found: list[Graph] = []
        for lengths in samples_in(entry.range, dims, first):
            graph = next((graph for graph in graphs if graph.serves(lengths)), None)
            if graph is not None and graph not in found:
                found.append(graph)
        lanes += [lane_of(entry, dims, graph) for graph in found]
    return lanes


def samples_in(range_: Range, dims: Dims, first: Lengths) -> Iterator[Lengths]:
    """Lengths of calls whose sizes are in a range."""
    bounds = dims.bounds(range_.start, range_.end)
    if bounds is None:
        return
    corners = itertools.product(*(dict.fromkeys((a, min(a + 1, b), b)) for a, b in bounds))
    near = (
        dims.near(size) for size in (range_.start, (range_.start + range_.end) // 2, range_.end)
    )
    for lengths in (first, *near, *corners, *_edges(range_, dims, bounds)):
        if dims.size_at(lengths) in range_:
            yield lengths


def _edges(range_: Range, dims: Dims, bounds: Sequence[tuple[int, int]]) -> Iterator[Lengths]:
    """Each dimension as short as can be, and the others about as long as the range lets them."""
    for index, (shortest, _) in enumerate(bounds):
        for short in (shortest, shortest + 1):
            lengths = [b for _, b in bounds]
            lengths[index] = short
            while dims.size_at(lengths) > range_.end and max(lengths) > 1:
                at = max((i for i in range(len(lengths)) if i != index), key=lambda i: lengths[i])
                if lengths[at] == 1:
                    break
                lengths[at] -= max(1, lengths[at] // 16)
            yield tuple(lengths)


def lane_of(
    entry: PlannedRange, dims: Dims, graph: Graph, fixed: Mapping[int, int] | None = None
) -> Lane:
    """The lane of a graph over several dimensions for a line of the plan, which has sizes that the
    graph serves; with some of them fixed, by their index."""
    range_ = entry.range
    within = dims.bounds(range_.start, range_.end)
    assert within is not None
    bounds = [
        _serving(index, a, b, graph, dims.names[index]) for index, (a, b) in enumerate(within)
    ]
    for index, length in (fixed or {}).items():
        bounds[index] = (length, length)
    hint = _hint(entry, dims, graph, bounds)
    lengths = zip(dims.names, bounds, hint, strict=True)
    needs = "; ".join(str(each) for each in graph.conditions if not _is_always(each, dims))
    return Lane(
        replace(
            entry,
            lengths=tuple((name, a, b, n) for name, (a, b), n in lengths),
            note=f"where {needs}" if needs else "",
        ),
        graph,
        (),
    )


def _serving(index: int, first: int, last: int, graph: Graph, name: str) -> tuple[int, int]:
    """The interval of a dimension without the ends that the graph's conditions on it alone rule
    out."""
    own = [c for c in graph.conditions if c.uses() == {name}]

    def holds(length: int) -> bool:
        return all(c.holds(*([length] * len(c.names))) for c in own)

    while first < last and not holds(first):
        first += 1
    while first < last and not holds(last):
        last -= 1
    return first, last


def _hint(
    entry: PlannedRange, dims: Dims, graph: Graph, bounds: Sequence[tuple[int, int]]
) -> Lengths:
    """Lengths to tune for, of a call that the graph serves."""
    near = [min(max(n, a), b) for n, (a, b) in zip(dims.near(entry.hint), bounds, strict=True)]
    around = [
        dict.fromkeys(n for n in (at, at - 1, at - 2, at - 3, a, a + 1, b) if a <= n <= b)
        for at, (a, b) in zip(near, bounds, strict=True)
    ]
    found = (
        lengths
        for lengths in itertools.product(*around)
        if dims.size_at(lengths) in entry.range and graph.serves(lengths)
    )
    return next(found, tuple(near))


def _is_always(condition: Assumption, dims: Dims) -> bool:
    """Whether a condition holds wherever it is tried."""
    each = [sorted({1, 2, 3, min(7, most), most}) for most in dims.largest]
    return all(condition.holds(*lengths) for lengths in itertools.product(*each))


def exact_lane(config: Config, dims: Dims, graph: Graph, lengths: Lengths) -> Lane:
    """The lane for one length of each of several dimensions."""
    size = dims.size_at(lengths)
    exact = tuple((name, n, n, n) for name, n in zip(dims.names, lengths, strict=True))
    return Lane(replace(config.planned(Range(size, size)), lengths=exact), graph, ())


def _has_one_owner(range_: Range, owner: array[int]) -> bool:
    """Whether all sizes of a range, shadowed ones included, have the same owner."""
    part = owner[range_.start : range_.end + 1]
    return all(value == part[0] for value in part)


def _part_of(
    config: Config, entry: PlannedRange, sizes: list[int], boundaries: dict[int, str]
) -> PlannedRange:
    """The line for those sizes of a range that one graph serves."""
    edges = [
        boundaries[s] for s in range(entry.range.start, entry.range.end + 2) if s in boundaries
    ]
    note = f"part of {entry.range}" + (f": the model asks {edges[0]}" if edges else "")
    parts = runs(sizes)
    range_ = Range(sizes[0], sizes[-1])
    made = config.planned(range_, parts if len(parts) > 1 else (), note)
    if made.hint not in sizes:
        made = replace(made, hint=min(sizes, key=lambda size: abs(size - made.hint)))
    return made
