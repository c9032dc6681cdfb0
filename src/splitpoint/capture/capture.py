"""Capture a callable once as one graph, with what that graph assumed of the size."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError, GraphBreak, SideEffect, UnsupportedGraph
from ..torch_internals.assumptions import Assumed
from ..torch_internals.dynamo import DynamoCapture, DynamoFailure, dynamo_capture
from ..torch_internals.guard_checks import Checks, Sees
from ..torch_internals.guard_expressions import GuardScope
from ..torch_internals.ones import other_shape
from ..torch_internals.sizes import Symbols, dim_symbol, equals, expression_of, in_terms_of_size
from .assumptions import Assumption, failing, read
from .dims import Dims, Lengths
from .facts import names_of
from .leaves import SizeLeaf, TensorLeaf
from .methods import Methods, Named, methods_in
from .module_state import ModuleState
from .reached import can_follow, reach_by
from .reads import Cells, Reads
from .result import Result
from .signature import Signature
from .sources import Argument, Bound, SizeInput

log = logging.getLogger("splitpoint")


@dataclass
class Capture:
    """One graph of a callable, and all that is needed to call it."""

    signature: Signature
    graph_module: fx.GraphModule
    placeholders: tuple[Any, ...]
    """Value (fake tensor, SymInt) of each graph input."""
    inputs: tuple[Argument | Bound | SizeInput, ...]
    result_leaves: tuple[object, ...]
    """Leaves of the callable's result: what `sources` has for them, or constants."""
    result_spec: Any
    assumptions: tuple[Assumption, ...]
    """What tracing took for granted about the size."""
    symbols: Symbols
    """What the symbols in `placeholders` and in the graph mean."""
    state: ModuleState
    """The module, and all else that was read, as it was."""
    read: Callable[[Collection[int]], dict[str, None]]
    """What tracing read, as expressions, without the tensors with these ids."""
    traced_code: tuple[Any, ...]
    methods: tuple[Named, ...]
    """The methods of the tree's classes that tracing went through."""

    def serves(self, lengths: Lengths) -> bool:
        """Whether the graph is right for lengths of the dynamic dimensions."""
        return all(assumption.holds(*lengths) for assumption in self.assumptions)

    @property
    def bound(self) -> dict[str, torch.Tensor]:
        """The tensors of the module that the graph takes, by the names of its inputs."""
        nodes = self.graph_module.graph.find_nodes(op="placeholder")
        return {
            node.name: self.state.bound[source.index]
            for node, source in zip(nodes, self.inputs, strict=True)
            if isinstance(source, Bound)
        }


def capture(
    function: Callable[..., Any],
    signature: Signature,
    lengths: Lengths,
    symbolic: Collection[int] | None = None,
) -> Capture:
    """Capture a callable at example lengths of its dynamic dimensions, of which those not in
    `symbolic` (by index; None for all) have these lengths alone.

    The arguments are made fresh, so nothing depends on which tensors the first call passed,
    nor on whether it passed one twice.

    Raises:
        CaptureError: when there is no full graph.
        SideEffect: when the callable changes Python objects that outlive the call.
        UnsupportedGraph: when the graph has inputs that are neither tensors nor the size.
    """
    every = range(len(lengths))
    examples, tensors = signature.examples(lengths, every if symbolic is None else symbolic)
    target = function
    if any(isinstance(leaf, SizeLeaf) for leaf in signature.leaves):
        target = _with_size_arguments(function, signature)
    args, kwargs = signature.call_arguments(examples)
    try:
        dynamo = dynamo_capture(target, args, kwargs)
    except DynamoFailure as error:
        raise _not_one_graph(error, described(signature.dims.names, lengths)) from error.__cause__
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

    ways = _ways(owner, dynamo.checks)
    modules = {way: value for way, value in ways.items() if isinstance(value, torch.nn.Module)}
    trees, places = list(modules), ways.keys() - modules.keys()
    # What a function reached has no common tree, in which classes could be named.
    named = owner if owner is not None else torch.nn.ModuleList(modules.values())
    names = methods_in(named, dynamo.traced_code)
    methods = Methods(named, names, function)

    def check_rest(tensors: Collection[int], reads: Reads | None) -> Callable[[], bool]:
        rest = dynamo.checks.rest(trees, places, tensors, _seen_by(reads))
        if reads is None:
            return lambda: methods.holds() and rest()
        methods.note(reads)
        return rest

    symbols = _symbols(signature, inputs, dynamo, tensors)
    result = Result(dynamo, signature, lengths, tensors, inputs, values, symbols)
    fetch_all = dynamo.inputs

    def fetch() -> list[Any]:
        current = fetch_all()
        return [*(current[position] for position in positions), *result.fetch_returned()]

    log.debug("captured %d nodes at %s", len(dynamo.graph_module.graph.nodes), lengths)
    return Capture(
        signature,
        dynamo.graph_module,
        dynamo.placeholders,
        tuple(inputs),
        result.leaves,
        result.spec,
        _assumptions(
            dynamo,
            symbols,
            signature,
            inputs,
            lengths,
            _fixed(signature, inputs, dynamo, every if symbolic is None else symbolic),
        ),
        symbols,
        ModuleState(
            owner,
            fetch,
            lambda: methods.holds() and dynamo.checks.check(),
            check_rest,
            lambda: methods.explain() or dynamo.checks.explain(),
            reach=reach_by(list(ways), lambda: _names(dynamo.checks.scope)),
        ),
        dynamo.checks.read,
        dynamo.traced_code,
        tuple(each for each in names if owner is not None or each[0] == "in"),
    )


def _not_one_graph(error: DynamoFailure, where: str) -> CaptureError:
    said = next(iter(str(error).splitlines()), "").strip()
    lines = [f"the model cannot be captured as one graph at {where}: {said}"]
    if error.line:
        lines.append(f"at {error.line}")
    kind: type[CaptureError] = CaptureError
    if error.is_break:
        kind = GraphBreak
        lines.append("rewrite it, or have the graph cut there by on_break='split'")
    found = kind("\n".join(lines))
    found.details = error.details
    return found


def _ways(
    owner: torch.nn.Module | None, checks: Checks
) -> dict[str, torch.nn.Module | torch.Tensor]:
    """The expressions that lead to what is watched, and where they lead now: to the owner alone,
    or to all that a function reached."""
    if owner is not None and checks.scope.owner is owner:
        return {"self": owner}
    names = _names(checks.scope)
    return {
        way: value
        for way, value in checks.reached().items()
        if (owner is None or value is owner) and can_follow(way, names)
    }


def _names(scope: GuardScope) -> dict[str, Any]:
    return names_of(scope.owner, Cells(scope.closure), scope.globals)


def _seen_by(reads: Reads | None) -> Sees:
    names: dict[str, Any] = {}

    def sees(code: str, scope: GuardScope) -> bool:
        if reads is None:
            return False
        if not names:
            names.update(_names(scope))
        return reads.sees(code, names)

    return sees


def _symbols(
    signature: Signature,
    inputs: list[Argument | Bound | SizeInput],
    dynamo: DynamoCapture,
    tensors: Sequence[torch.Tensor],
) -> Symbols:
    """What each symbol in the arguments' shapes and strides is in terms of the dynamic
    dimensions."""
    # One that tracing fixed to a number no longer occurs in any shape, only in a guard.
    index_of = {id(tensor): index for index, tensor in enumerate(tensors)}
    meanings: dict[Any, Any] = {}
    for symbol in dynamo.dimensions:
        which = 0
        if not signature.dims.is_size_alone:
            tensor, dim = dynamo.places_of(symbol)[0]
            which = signature.tensors[index_of[id(tensor)]].dynamic[dim]
        meanings[symbol] = signature.dims.symbols[which]
    for source, value in zip(inputs, dynamo.placeholders, strict=True):
        if not isinstance(source, Argument):
            continue
        leaf = signature.tensors[source.index]
        for dim, stride in enumerate(value.stride()):
            # Dynamo gives a stride that does not follow from the shape a symbol of its own.
            if isinstance(stride, torch.SymInt) and (symbol := stride.node.expr).is_Symbol:
                meanings.setdefault(symbol, _stride(leaf, dim, signature.dims))
    return meanings


def _stride(leaf: TensorLeaf, dim: int, dims: Dims) -> Any:
    """The stride of an argument's dimension in terms of the dynamic dimensions."""
    factor, powers = leaf.stride_at(dim, len(dims.names))
    return math.prod([factor, *(s**n for s, n in zip(dims.symbols, powers, strict=True))])


def _strides(
    dynamo: DynamoCapture,
    symbols: Symbols,
    signature: Signature,
    inputs: list[Argument | Bound | SizeInput],
) -> list[Assumed]:
    """Where the strides that Dynamo took arguments to have are those that they will have: at an
    example length of 1 it cannot tell which dimension another one's stride follows from."""
    found: list[Assumed] = []
    for source, value in zip(inputs, dynamo.placeholders, strict=True):
        if not isinstance(source, Argument):
            continue
        leaf = signature.tensors[source.index]
        for dim, (length, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
            taken, size = expression_of(stride), expression_of(length)
            assert taken is not None
            assert size is not None
            means = equals(in_terms_of_size(taken, symbols), _stride(leaf, dim, signature.dims))
            if means is not True and size != 1:
                found.append(Assumed(means, f"the layout of {leaf.path}"))
    return found


def _fixed(
    signature: Signature,
    inputs: list[Argument | Bound | SizeInput],
    dynamo: DynamoCapture,
    symbolic: Collection[int],
) -> set[int]:
    """Which dynamic dimensions are numbers in the graph."""
    return set(range(len(signature.dims.names))).difference(symbolic) | {
        which
        for source, value in zip(inputs, dynamo.placeholders, strict=True)
        if isinstance(source, Argument)
        for dim, which in signature.tensors[source.index].dynamic.items()
        if not isinstance(value.shape[dim], torch.SymInt)
    }


def _assumptions(
    dynamo: DynamoCapture,
    symbols: Symbols,
    signature: Signature,
    inputs: list[Argument | Bound | SizeInput],
    lengths: Lengths,
    fixed: Collection[int],
) -> tuple[Assumption, ...]:
    names = signature.dims.names
    found = read(
        [*dynamo.assumptions(symbols), *_strides(dynamo, symbols, signature, inputs)], names
    )
    for which in sorted(fixed):
        code = f"{names[which]} == {lengths[which]}"
        if not any(a.code == code for a in found):
            found += (Assumption(code, "", names),)
    return found + _not_one(dynamo, symbols, names, lengths, fixed, found)


def _not_one(
    dynamo: DynamoCapture,
    symbols: Symbols,
    names: tuple[str, ...],
    lengths: Lengths,
    fixed: Collection[int],
    known: Sequence[Assumption],
) -> tuple[Assumption, ...]:
    """That dimensions are not 1, where the graph's shapes would be others then."""
    found: list[Assumption] = []
    for which, name in enumerate(names):
        at = [1 if index == which else max(n, 2) for index, n in enumerate(lengths)]
        at = [n if index in fixed else at[index] for index, n in enumerate(lengths)]
        if which in fixed or failing(known, *at):
            continue
        values = dict(zip(map(dim_symbol, names), at, strict=True))
        given = {symbol: int(meaning.xreplace(values)) for symbol, meaning in symbols.items()}
        if (said := other_shape(dynamo.graph_module, given)) is not None:
            found.append(Assumption(f"{name} != 1", said, names))
    return tuple(found)


def described(names: Sequence[str], lengths: Lengths) -> str:
    """`size 5`, or `batch 3, length 17`."""
    return ", ".join(f"{name} {length}" for name, length in zip(names, lengths, strict=True))


def _with_size_arguments(function: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """The callable with its integer arguments that are dynamic dimensions read off the first tensor
    that has them, so that capture sees them as the same symbols. Called with keyword arguments by
    parameter name."""
    spec, leaves = signature.spec, signature.leaves
    top_level = set(spec.context)
    sized: dict[str, tuple[str, int]] = {}
    """By the name of an integer argument: a tensor argument, and its dimension."""
    for leaf in leaves:
        if not isinstance(leaf, SizeLeaf):
            continue
        if leaf.path not in top_level:
            raise UnsupportedGraph(
                f"{leaf.path} is a size inside a container: pass it as an argument of its own"
            )
        having = [
            (tensor.path, dim)
            for tensor in signature.tensors
            for dim, which in tensor.dynamic.items()
            if which == leaf.which
        ]
        if not having or having[0][0] not in top_level:
            where = f"but {having[0][0]} is inside a container" if having else "but there is none"
            raise UnsupportedGraph(
                f"the size arguments need a tensor argument that has the size, {where}"
            )
        sized[leaf.path] = having[0]
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
        for name, (tensor, dim) in sized.items():
            bound[name] = bound[tensor].shape[dim]
        return function(**bound)

    return with_size_arguments


def _advice(changed: Sequence[str]) -> str:
    """What else to do, where a cache of keys and values is what changes."""
    if not any(".layers[" in each or "key_cache" in each for each in changed):
        return ""
    return (
        "; for a transformers model with a KV cache call splitpoint.integrations.transformers."
        "compile(model)"
    )


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
            f"repeat: {', '.join(own[:3])}{f' and {len(own) - 3} more' if own[3:] else ''}. Return "
            f"the value instead, or keep it in a buffer that is updated in place{_advice(own)}"
        )
