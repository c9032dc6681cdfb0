"""One straight-line function per range: call pieces and splitting ops, free what is done."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.module_state import Held
from ..capture.postfix import NotPostfix, size_postfix
from ..capture.sources import Argument, Bound, GraphOutput, Integer, Shape, SizeInput
from ..torch_internals.containers import tree_flatten, tree_unflatten
from .overlap import Apart, Updates
from .pieces import CallOp, CallPiece, Name, Size, Split

Stitched = Callable[..., Any]
"""Called with the lengths of the dynamic dimensions, then the call's tensor arguments; returns the
callable's result."""


@dataclass(frozen=True)
class CompiledPiece:
    """A piece as one range calls it."""

    call: Callable[..., Sequence[Any]]
    """Takes the dimensions `takes`, then the tensors of `sources`."""
    sources: Sequence[tuple[int, str]]
    """For each tensor: which of the piece's inputs it is, in which layout."""
    takes: tuple[str, ...] = ()
    """The dimensions that it is given."""
    steps: PieceSteps | None = None


@dataclass(frozen=True)
class PieceSteps:
    """What a compiled piece does, for the runner in C++."""

    data: Mapping[str, Any]
    """What `runner.pieces.piece_steps` returned."""
    places: Callable[[], list[tuple[str, str]]]
    """Where its kernels are, once they are built, in the order of `data["kernels"]`: the path of a
    shared library and a name in it."""


@dataclass(frozen=True)
class Packed:
    """How a stitched function sees that its packed weights are those of the module."""

    fresh: Callable[[], bool]
    repack: Callable[[], None]


@dataclass(frozen=True)
class Guard:
    """What a stitched function checks of the module before it runs."""

    checks: Sequence[Callable[[], bool]]
    refresh: Callable[[], None]
    """Called when something is not as it was: binds anew what was replaced, or raises."""
    held: Sequence[Held] | None
    """None: tensors are held where a replacement cannot be seen, so refresh every time."""


@dataclass(frozen=True)
class Body:
    """A stitched function without what it checks first."""

    parameters: tuple[str, ...]
    lines: tuple[str, ...]
    names: Mapping[str, Any]
    """What the lines name: compiled pieces ("p_" and their fingerprint), operators and other
    constants; tensors of the module come by `rebind`."""
    packed: tuple[tuple[int, str], ...]
    """The (`Bound.index`, layout) of the packed weights it reads, in the order in which it does."""
    steps: tuple[Any, ...] = ()
    """For each line what it does, as JSON: ["piece", name, inputs, outputs], ["op", name,
    arguments, keyword arguments, output] or ["free", names]; None for what only Python can do.
    In arguments {"t": name} is a tensor, {"e": text} an integer in postfix, {"k": name} a
    constant."""
    pieces: Mapping[str, PieceSteps] = field(default_factory=dict)
    """What the pieces do, by name, where the runner can do it."""
    updates: Updates | None = None
    """What of its parameters and of the module's tensors it updates in place, if anything."""


@dataclass(frozen=True)
class Native:
    """Lines that call the runner instead of those of a `Body`."""

    lines: tuple[str, ...]
    programs: Mapping[str, Any]
    """The runner's programs by the names that the lines give them."""
    bound: tuple[tuple[Any, tuple[str, ...]], ...]
    """Each program with the names of the tensors of the module that it reads."""
    interposed: Callable[[], bool]
    """Whether something wants to see each operator that Python calls."""


def stitch(
    split: Split,
    inputs: Sequence[Argument | Bound | SizeInput],
    compiled: Mapping[str, CompiledPiece],
    argument_count: int,
    result: tuple[Sequence[Any], Any] | None,
) -> Body:
    """Write the function of one range.

    Args:
        split: the steps.
        inputs: where each graph input comes from.
        compiled: a callable for each unique piece, by fingerprint.
        argument_count: how many tensor arguments a call has.
        result: leaves (of `capture.sources`, or constants) and pytree spec of what the callable
            returns; None to return the tuple of graph outputs.
    """
    return _Writer(split, inputs, compiled, argument_count).body(result)


def assemble(
    body: Body,
    guard: Guard | None,
    packed: Packed | None = None,
    native: Native | None = None,
    apart: Apart | None = None,
) -> Stitched:
    """Make the function. `rebind` must follow before it is called.

    Args:
        body: what it does.
        guard: what to check of the module at each call, if anything.
        packed: how to keep packed weights up to date, where there are any and the guard does
            not see that they are.
        native: how to do the same with the runner in C++.
        apart: what sees to it that nothing overlaps with what it updates in place.
    """
    names = dict(body.names)
    first: list[str] = []

    def constant(value: Any) -> str:
        name = f"k{len(names)}"
        names[name] = value
        return name

    if guard is not None and guard.held is None:
        first.append(f"{constant(guard.refresh)}()")
    elif guard is not None:
        facts = [f"h{i}.get({fact.key!r}) is o{i}" for i, fact in enumerate(guard.held or ())]
        checks = [f"{constant(check)}()" for check in guard.checks]
        conditions = " and ".join([*checks, *facts])
        first.append(f"if not ({conditions}): {constant(guard.refresh)}()")
    if body.packed and packed is not None:
        first.append(f"if not {constant(packed.fresh)}(): {constant(packed.repack)}()")
    if apart is not None:
        # Where something is held there is no watch, which sees that a tensor has other memory.
        first += apart.lines(constant, follow=guard is not None and bool(guard.held))
        names[_APART] = apart
    if native is None:
        return _define("stitched", body.parameters, [*first, *body.lines], names)

    def plain(*args: Any) -> Any:
        if "plain" not in names:
            _define("plain", body.parameters, body.lines, names)
        return names["plain"](*args)

    names |= native.programs
    names[_BOUND] = native.bound
    aside = f"if {constant(native.interposed)}(): "
    first.append(f"{aside}return {constant(plain)}({', '.join(body.parameters)})")
    return _define("stitched", body.parameters, [*first, *native.lines], names)


def _define(
    name: str, parameters: Sequence[str], lines: Sequence[str], names: dict[str, Any]
) -> Stitched:
    """Define a function among `names`, which are its globals."""
    body = "\n    ".join(lines)
    source = f"def {name}({', '.join(parameters)}):\n    {body}\n"
    exec(_code(source), names)
    function: Stitched = names[name]
    function.__doc__ = source
    return function


_BOUND = "_bound"
_APART = "_apart"


@functools.lru_cache(maxsize=64)  # ranges often come to the same text
def _code(source: str) -> types.CodeType:
    return compile(source, "<splitpoint stitched>", "exec")


def rebind(
    stitched: Stitched,
    bound: Sequence[Any],
    held: Sequence[Held] | None,
    packed: Mapping[tuple[int, str], Any] | None = None,
) -> None:
    """Give a stitched function the tensors that the module holds, by `Bound.index`, and their
    packed copies, by index and layout.

    Raises:
        StateChanged: when they overlap otherwise than at capture, and one is updated in place.
    """
    names = {f"w{index}": value for index, value in enumerate(bound)}
    for (index, layout), value in (packed or {}).items():
        names[f"w{index}_{layout}"] = value
    for index, fact in enumerate(held or ()):
        names[f"h{index}"] = fact.holder
        names[f"o{index}"] = fact.value
    known = stitched.__globals__
    if _APART in known:
        known[_APART].bind(bound)
    known.update(names)
    for program, tensors in known.get(_BOUND, ()):
        program.bind([known[name] for name in tensors])


_LEAF = tree_flatten(0)[1]


class _Writer:
    def __init__(
        self,
        split: Split,
        inputs: Sequence[Argument | Bound | SizeInput],
        compiled: Mapping[str, CompiledPiece],
        argument_count: int,
    ) -> None:
        self.split = split
        self.compiled = compiled
        self.namespace: dict[str, Any] = {"math": math}
        self.parameters = [*split.dims.names, *(f"a{index}" for index in range(argument_count))]
        self.names: dict[str, str] = {}
        for name, source in zip(split.inputs, inputs, strict=True):
            if isinstance(source, Argument):
                self.names[name] = f"a{source.index}"
            elif isinstance(source, Bound):
                self.names[name] = f"w{source.index}"
        self.lines: list[str] = []
        self.steps: list[Any] = []
        self.bound = {
            name: source.index
            for name, source in zip(split.inputs, inputs, strict=True)
            if isinstance(source, Bound)
        }
        self.packed: dict[tuple[int, str], None] = {}

    def body(self, result: tuple[Sequence[Any], Any] | None) -> Body:
        uses = [self.used(step) for step in self.split.steps]
        last = {name: index for index, used in enumerate(uses) for name in used}
        kept = self.used(self.split.outputs)
        for index, step in enumerate(self.split.steps):
            self.write(step)
            made = step.outputs if isinstance(step, CallPiece) else (step.output,)
            done = [name for name in sorted(uses[index]) if last[name] == index]
            unused = [name for name in made if name not in last]
            locals_ = [self.names[name] for name in done + unused if name not in kept]
            if dead := [local for local in locals_ if local.startswith("v")]:
                self.add(f"del {', '.join(dead)}", ["free", dead])
        if result is None:
            self.add(f"return {self.code(tuple(self.split.outputs))}", None)
        else:
            self.add(f"return {self.write_result(iter(result[0]), result[1])}", None)
        return Body(
            tuple(self.parameters),
            tuple(self.lines),
            self.namespace,
            tuple(self.packed),
            tuple(self.steps),
            {f"p_{name}": made.steps for name, made in self.compiled.items() if made.steps},
            None if self.split.updates is None else self.split.updates.renamed(self.names),
        )

    def add(self, line: str, step: list[Any] | None) -> None:
        self.lines.append(line)
        self.steps.append(step)

    def write_result(self, leaves: Iterator[Any], spec: Any) -> str:
        """Source that nests the leaves of the result as the callable returned them."""
        if spec.is_leaf():
            return self.leaf(next(leaves))
        if spec.type not in (tuple, list, dict):
            flat = [self.write_result(leaves, _LEAF) for _ in range(spec.num_leaves)]
            unflatten = self.constant(tree_unflatten)
            return f"{unflatten}([{', '.join(flat)}], {self.constant(spec)})"
        parts = [self.write_result(leaves, child) for child in spec.children()]
        if spec.type is tuple:
            return f"({''.join(part + ', ' for part in parts)})"
        if spec.type is list:
            return f"[{', '.join(parts)}]"
        pairs = zip(spec.context, parts, strict=True)
        return f"{{{', '.join(f'{self.code(key)}: {part}' for key, part in pairs)}}}"

    def leaf(self, leaf: Any) -> str:
        if isinstance(leaf, GraphOutput):
            return self.code(self.split.outputs[leaf.index])
        if isinstance(leaf, (Argument, Bound)):
            return f"{'a' if isinstance(leaf, Argument) else 'w'}{leaf.index}"
        if isinstance(leaf, Integer):
            return f"({leaf.code})"
        if isinstance(leaf, Shape):
            parts = "".join(f"{self.leaf(part)}, " for part in leaf.parts)
            return f"{self.constant(torch.Size)}(({parts}))"
        return self.code(leaf)

    def write(self, step: CallPiece | CallOp) -> None:
        if isinstance(step, CallPiece):
            compiled = self.compiled[step.fingerprint]
            tensors = [self.input(step.inputs[index], layout) for index, layout in compiled.sources]
            sizes = list(compiled.takes)
            call = f"p_{step.fingerprint}"
            self.namespace[call] = compiled.call
            targets = [self.new(name) for name in step.outputs]
            left = f"({', '.join(targets)},) = " if targets else ""
            line = f"{left}{call}({', '.join(sizes + tensors)})"
            self.add(line, ["piece", call, tensors, targets])
        else:
            args = [self.code(value) for value in step.args]
            args += [f"{name}={self.code(value)}" for name, value in step.kwargs.items()]
            call = self.constant(step.target)
            made = self.step(call, step)
            output = self.new(step.output)
            self.add(
                f"{output} = {call}({', '.join(args)})", None if made is None else [*made, output]
            )

    def step(self, call: str, step: CallOp) -> list[Any] | None:
        try:
            kwargs = {name: self.kept(value) for name, value in step.kwargs.items()}
            return ["op", call, [self.kept(value) for value in step.args], kwargs]
        except NotPostfix:
            return None

    def kept(self, value: Any) -> Any:
        """A value of a step as JSON."""
        if isinstance(value, Name):
            return {"t": self.names[value.name]}
        if isinstance(value, Size):
            return {"e": size_postfix(value.code, self.split.dims.names)}
        if type(value) in (tuple, list):
            return [self.kept(each) for each in value]
        if type(value) is dict or isinstance(value, slice):
            raise NotPostfix(f"a {type(value).__name__}")
        if value is None or type(value) in (bool, int, str):
            return value
        return {"k": self.constant(value)}

    def input(self, name: str, layout: str) -> str:
        if layout == "plain":
            return self.names[name]
        self.packed[self.bound[name], layout] = None
        return f"{self.names[name]}_{layout}"

    def new(self, name: str) -> str:
        self.names[name] = f"v{len(self.names)}"
        return self.names[name]

    def constant(self, value: Any) -> str:
        for name, known in self.namespace.items():
            if known is value and name.startswith("k"):
                return name
        name = f"k{len(self.namespace)}"
        self.namespace[name] = value
        return name

    def code(self, value: Any) -> str:
        """Source for a value of a step."""
        if isinstance(value, Name):
            return self.names[value.name]
        if isinstance(value, Size):
            return f"({value.code})"
        if type(value) is tuple:
            return f"({''.join(self.code(v) + ', ' for v in value)})"
        if type(value) is list:
            return f"[{', '.join(map(self.code, value))}]"
        if type(value) is dict:
            return f"{{{', '.join(f'{k!r}: {self.code(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            return (
                f"slice({self.code(value.start)}, {self.code(value.stop)}, {self.code(value.step)})"
            )
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self.constant(value)

    def used(self, value: Any) -> set[str]:
        """Names of the values that a step, or a value of one, reads."""
        if isinstance(value, Name):
            return {value.name}
        if isinstance(value, CallPiece):
            return set(value.inputs)
        if isinstance(value, CallOp):
            return self.used(value.args) | self.used(value.kwargs)
        if isinstance(value, (tuple, list)):
            return set().union(*map(self.used, value))
        if isinstance(value, dict):
            return set().union(*map(self.used, value.values()))
        if isinstance(value, slice):
            return self.used((value.start, value.stop, value.step))
        return set()
