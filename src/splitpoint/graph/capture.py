"""Capture a callable once as one graph, with what that graph assumed of the size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from .._torch_checks import Sees
from .._torch_guards import GuardScope
from ..errors import CaptureError, SideEffect, UnsupportedGraph
from .assumptions import Assumption, read
from .facts import names_of
from .methods import Methods, Named, methods_in
from .reads import Cells, Reads
from .signature import Signature, SizeLeaf, TensorLeaf

log = logging.getLogger("splitpoint")


@dataclass(frozen=True)
class Argument:
    """A graph input that is the call's `index`-th tensor argument."""

    index: int


@dataclass(frozen=True)
class Bound:
    """A graph input that the module holds (a parameter, a buffer, a tensor it closes over)."""

    index: int


@dataclass(frozen=True)
class SizeInput:
    """A graph input that is the size."""


@dataclass(frozen=True)
class GraphOutput:
    """A leaf of the result that the graph computes, by output index."""

    index: int


@dataclass(frozen=True)
class Held:
    """That a dict of the module tree holds an object under a key: a bound tensor, or a
    submodule on the way to one. While all of these are true, the tensors bound are those
    that the module has."""

    holder: dict[str, Any]
    key: str
    value: object


@dataclass
class Capture:
    """One graph of a callable, and all that is needed to call it."""

    signature: Signature
    graph_module: fx.GraphModule
    placeholders: tuple[Any, ...]
    """Value (fake tensor, SymInt) of each graph input."""
    inputs: tuple[Argument | Bound | SizeInput, ...]
    result_leaves: tuple[GraphOutput | Argument | object, ...]
    """Leaves of the callable's result: from the graph, an argument returned as it came, or
    a constant."""
    result_spec: Any
    assumptions: tuple[Assumption, ...]
    """What tracing took for granted about the size."""
    symbols: _torch.Symbols
    """What the symbols in `placeholders` and in the graph mean."""
    fetch: Callable[[], list[Any]]
    """The bound tensors as the module holds them now."""
    check: Callable[[], bool]
    """Whether all else that was guarded is as it was."""
    check_rest: Callable[[torch.nn.Module, Collection[int], Reads | None], Callable[[], bool]]
    """`check` without what a watch over the module and these tensors' ids sees anyway, and
    without what `Reads` comes to see."""
    owner: torch.nn.Module | None
    """The module whose tree may hold bound tensors."""
    explain: Callable[[], str]
    read: Callable[[Collection[int]], dict[str, None]]
    """What tracing read, as expressions, without the tensors with these ids."""
    traced_code: tuple[Any, ...]
    methods: tuple[Named, ...]
    """The methods of the tree's classes that tracing went through."""
    held: Callable[[list[Any]], tuple[Held, ...] | None]
    """Given the bound tensors: what to compare to notice a replaced one; None when the
    module tree does not hold all of them."""


def capture(
    function: Callable[..., Any], signature: Signature, size: int, dynamic: bool = True
) -> Capture:
    """Capture a callable at an example size; if not `dynamic`, for that size alone.

    The arguments are made fresh, so nothing depends on which tensors the first call passed,
    nor on whether it passed one twice.

    Raises:
        CaptureError: when there is no full graph.
        SideEffect: when the callable changes Python objects that outlive the call.
        UnsupportedGraph: when the graph has inputs that are neither tensors nor the size.
    """
    examples, tensors = signature.examples(size, dynamic)
    target = function
    if any(isinstance(leaf, SizeLeaf) for leaf in signature.leaves):
        target = _with_size_arguments(function, signature)
    args, kwargs = signature.call_arguments(examples)
    try:
        dynamo = _torch.dynamo_capture(target, args, kwargs)
    except _torch.DynamoFailure as error:
        raise CaptureError(
            f"the model cannot be captured as one graph at size {size}: {error}"
        ) from error.__cause__
    _check_side_effects(dynamo.side_effects)

    owner = function if isinstance(function, torch.nn.Module) else None
    if owner is None and isinstance(
        bound_to := getattr(function, "__self__", None), torch.nn.Module
    ):
        owner = bound_to
    argument_of = {id(tensor): index for index, tensor in enumerate(tensors)}
    values = dynamo.inputs()
    inputs: list[Argument | Bound | SizeInput] = []
    positions: list[int] = []
    for position, (value, meta) in enumerate(zip(values, dynamo.placeholders, strict=True)):
        if isinstance(meta, torch.SymInt):
            inputs.append(SizeInput())
        elif not isinstance(value, torch.Tensor):
            raise UnsupportedGraph(
                f"the graph takes a {type(value).__name__} as input; only tensors and the size "
                f"can be passed"
            )
        elif id(value) in argument_of:
            inputs.append(Argument(argument_of[id(value)]))
        else:
            inputs.append(Bound(len(positions)))
            positions.append(position)

    names = methods_in(owner, dynamo.traced_code)
    methods = Methods(owner, names, function)

    def check_rest(
        module: torch.nn.Module, tensors: Collection[int], reads: Reads | None
    ) -> Callable[[], bool]:
        rest = dynamo.checks.rest(module, tensors, _seen_by(reads))
        if reads is None:
            return lambda: methods.holds() and rest()
        methods.note(reads)
        return rest

    symbols = _symbols(signature, inputs, dynamo)
    leaves, spec = _result(dynamo, argument_of)
    fetch_all = dynamo.inputs

    def fetch() -> list[Any]:
        current = fetch_all()
        return [current[position] for position in positions]

    log.debug("captured %d nodes at size %d", len(dynamo.graph_module.graph.nodes), size)
    return Capture(
        signature,
        dynamo.graph_module,
        dynamo.placeholders,
        tuple(inputs),
        leaves,
        spec,
        _assumptions(
            dynamo, symbols, size if not dynamic or _is_fixed(signature, inputs, dynamo) else None
        ),
        symbols,
        fetch,
        lambda: methods.holds() and dynamo.checks.check(),
        check_rest,
        owner,
        lambda: methods.explain() or dynamo.checks.explain(),
        dynamo.checks.read,
        dynamo.traced_code,
        tuple(names),
        lambda tensors: held(owner, tensors),
    )


def _seen_by(reads: Reads | None) -> Sees:
    names: dict[str, Any] = {}

    def sees(code: str, scope: GuardScope) -> bool:
        if reads is None:
            return False
        if not names:
            names.update(names_of(scope.owner, Cells(scope.closure), scope.globals))
        return reads.sees(code, names)

    return sees


def _symbols(
    signature: Signature,
    inputs: list[Argument | Bound | SizeInput],
    dynamo: _torch.DynamoCapture,
) -> _torch.Symbols:
    """What each symbol in the arguments' shapes and strides is in terms of the size."""
    # One that tracing fixed to a number no longer occurs in any shape, only in a guard.
    meanings: dict[Any, Any] = dict.fromkeys(dynamo.dimensions, _torch.size_symbol())
    for source, value in zip(inputs, dynamo.placeholders, strict=True):
        if not isinstance(source, Argument):
            continue
        leaf = signature.tensors[source.index]
        for dim, stride in enumerate(value.stride()):
            # Dynamo gives a stride that does not follow from the shape a symbol of its own.
            if isinstance(stride, torch.SymInt) and (symbol := stride.node.expr).is_Symbol:
                constant, slope = leaf.stride_at(dim)
                meanings.setdefault(symbol, constant + slope * _torch.size_symbol())
    return meanings


def _is_fixed(
    signature: Signature,
    inputs: list[Argument | Bound | SizeInput],
    dynamo: _torch.DynamoCapture,
) -> bool:
    """Whether tracing turned a dynamic dimension into a number."""
    return any(
        not isinstance(value.shape[dim], torch.SymInt)
        for source, value in zip(inputs, dynamo.placeholders, strict=True)
        if isinstance(source, Argument)
        for dim in signature.tensors[source.index].dims
    )


def _assumptions(
    dynamo: _torch.DynamoCapture, symbols: _torch.Symbols, only: int | None
) -> tuple[Assumption, ...]:
    found = read(dynamo.assumptions(symbols))
    if only is not None and not any(a.code == f"size == {only}" for a in found):
        found += (Assumption(f"size == {only}", ""),)
    return found


def _with_size_arguments(function: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """The callable with its integer size arguments read off the first sized tensor, so that
    capture sees them as the same symbol. Called with keyword arguments by parameter name."""
    spec, leaves = signature.spec, signature.leaves
    source = next(
        (index, leaf.dims[0])
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, TensorLeaf) and leaf.dims
    )
    sized = [index for index, leaf in enumerate(leaves) if isinstance(leaf, SizeLeaf)]
    top_level = {name: i for i, name in enumerate(spec.context)}
    starts = []
    position = 0
    for child in spec.children():
        starts.append(position)
        position += child.num_leaves
    for index in sized:
        if leaves[index].path not in top_level:
            raise UnsupportedGraph(
                f"{leaves[index].path} is a size inside a container: pass it as an argument of "
                f"its own"
            )
    tensor_path = leaves[source[0]].path
    if tensor_path not in top_level:
        raise UnsupportedGraph(
            f"the size arguments need a tensor argument that has the size, but {tensor_path} is "
            f"inside a container"
        )
    names = [leaves[index].path for index in sized]
    dim = source[1]
    parameters = signature.parameters.parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    variadic = {
        n: p.kind for n, p in parameters.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    if positional or variadic:
        raise UnsupportedGraph(
            "a callable with size arguments must take all its arguments by keyword, but it has "
            f"{', '.join([*positional, *variadic])}"
        )

    def with_size_arguments(*args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(parameters, args, strict=False)) | kwargs
        size = bound[tensor_path].shape[dim]
        for name in names:
            bound[name] = size
        return function(**bound)

    return with_size_arguments


def _check_side_effects(sources: tuple[str, ...]) -> None:
    """Refuse changes to the module, the arguments and the caller's globals.

    Globals of imported modules (a library's own bookkeeping, such as a recorder that is
    set and reset around a forward) are let be, and named in the log.
    """
    libraries = tuple(source for source in sources if source.startswith("G['__import_"))
    if libraries:
        log.info("changes to %s are not repeated by the compiled graph", ", ".join(libraries))
    if own := [source for source in sources if source not in libraries]:
        raise SideEffect(
            f"the model changes Python state in its forward, which a compiled graph would not "
            f"repeat: {', '.join(own)}. Return the value instead, or keep it in a buffer that is "
            f"updated in place"
        )


def _result(
    dynamo: _torch.DynamoCapture, argument_of: dict[int, int]
) -> tuple[tuple[GraphOutput | Argument | object, ...], Any]:
    """Where each leaf of the callable's result comes from, and how they nest."""
    outputs = dynamo.graph_module.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    probes: list[Any] = [
        torch.empty(0)
        if isinstance(node, fx.Node) and isinstance(node.meta["example_value"], torch.Tensor)
        else _FIRST_PROBE + index
        for index, node in enumerate(outputs)
    ]
    output_of = {id(probe): index for index, probe in enumerate(probes)}
    values, spec = _torch.tree_flatten(dynamo.result(probes))
    leaves: list[GraphOutput | Argument | object] = []
    for value in values:
        if isinstance(value, int) and value >= _FIRST_PROBE:
            leaves.append(GraphOutput(value - _FIRST_PROBE))
        elif id(value) in output_of:
            leaves.append(GraphOutput(output_of[id(value)]))
        elif id(value) in argument_of:
            leaves.append(Argument(argument_of[id(value)]))
        elif isinstance(value, tuple) and any(
            isinstance(part, int) and part >= _FIRST_PROBE for part in value
        ):
            raise UnsupportedGraph(
                f"the model returns a {type(value).__name__} that holds the size: return the "
                f"integers, or the tensor itself"
            )
        else:
            leaves.append(value)
    return tuple(leaves), spec


_FIRST_PROBE = 7_919_000_000_000
"""Stands, with those above it, for integers that the graph returns; no real size is near."""


def held(owner: torch.nn.Module | None, tensors: list[Any]) -> tuple[Held, ...] | None:
    """What to compare to notice that a module tree holds other tensors than these; None when
    it does not hold all of them."""
    wanted = {id(tensor) for tensor in tensors}
    found: list[Held] = []

    def visit(module: torch.nn.Module) -> None:
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if id(tensor) in wanted:
                    wanted.discard(id(tensor))
                    found.append(Held(holder, key, tensor))
        for key, child in module._modules.items():
            if child is not None:
                before = len(found)
                visit(child)
                if len(found) > before:  # something is found by way of the child
                    found.insert(before, Held(module._modules, key, child))

    if owner is not None:
        visit(owner)
    return None if wanted else tuple(found)
