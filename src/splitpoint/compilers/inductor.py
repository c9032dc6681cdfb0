"""Compile a piece for one range with Inductor, and read back what that assumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..capture.assumptions import Assumption, read, valid
from ..capture.postfix import lengths_postfix
from ..errors import CompileError, SplitpointError, UnknownInductorOption
from ..graph.pieces import Piece
from ..graph.stitch import PieceSteps
from ..passes.base import Pass
from ..passes.manager import MatchCount, PassManager
from ..ranges import PlannedRange, Range
from ..torch_internals.assumptions import read_assumptions
from ..torch_internals.cpp_kernels import Kernel, kernel_place
from ..torch_internals.graphs import with_numbers
from ..torch_internals.inductor import InductorGraph, inductor_compile, inductor_options
from ..torch_internals.pass_notes import take_notes
from ..torch_internals.questions import Questions
from ..torch_internals.sizes import Extent, range_shapes
from ..torch_internals.triton_kernels import Binary
from .native_steps import NoStep
from .native_steps import piece_steps as steps_of
from .wrapper import NotPlain, Wrapper, read_wrapper

log = logging.getLogger("splitpoint")


@dataclass(frozen=True)
class Compiled:
    """A piece compiled for one range."""

    call: Callable[..., Sequence[Any]]
    """Takes the dimensions that the piece does, then its tensors; returns its outputs."""
    assumptions: tuple[Assumption, ...]
    """What the compiler came to assume about the size beyond the range's bounds."""
    matches: tuple[MatchCount, ...]
    bare: Bare | None = None
    """What `call` is made of, where that is known."""
    steps: PieceSteps | None = None
    """What `call` does, where the runner in C++ can do it."""
    waiting: tuple[Kernel, ...] = ()
    """Kernels that are to be built; one that is not is built when it is first called."""
    serves: tuple[Range, ...] = ()
    """Parts of the range that need no compile of their own: their bounds and hint would decide
    nothing otherwise (`torch_internals.questions`)."""


@dataclass(frozen=True)
class Bare:
    """Inductor's code without the wrappers around it."""

    call: Callable[..., Sequence[Any]]
    wrapper: Wrapper
    kernels: Mapping[str, Callable[..., Any]]
    steps: Mapping[str, Any] | None
    """The same for the runner in C++, where it can do it."""
    binaries: Sequence[Binary] = ()
    """What Triton made of the kernels."""


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that Inductor does not have.

    Raises:
        UnknownInductorOption: naming the option and close matches.
    """
    import difflib

    known = inductor_options()
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            mend = f": did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise UnknownInductorOption(f"Inductor has no option {name!r}{mend}")


def compile_piece(
    piece: Piece,
    planned: PlannedRange,
    passes: Sequence[Pass],
    options: Mapping[str, Any] | None = None,
    trusted: Collection[int] = (),
    parts: Sequence[PlannedRange] = (),
) -> Compiled:
    """Compile a piece for one line of the plan, in a ShapeEnv of its own; `options` are added
    to those of the plan. The tensor inputs `trusted` are checked before each call. `parts` are
    narrower ranges that would be compiled with the same options and passes.

    Raises:
        CompileError: when Inductor fails; the cause says why.
        PassError: when a pass does.
    """
    range_ = planned.range
    shapes = range_shapes(extents(piece, planned))
    lengths = dict(zip(piece.dims.names, shapes.lengths, strict=True))
    inputs: list[Any] = [lengths[name] for name in piece.takes]
    inputs += [shapes.value(value, piece.symbols) for value in piece.values]
    # AOTAutograd would make a symbol without bounds of a number that is passed.
    fixed = {name: each for name in piece.takes if isinstance(each := lengths[name], int)}
    graph_module = with_numbers(piece.graph_module, fixed) if fixed else piece.graph_module
    manager = PassManager(passes, piece.fingerprint, range_)
    # Inductor's cache keys know neither range nor hint, and would serve this range the
    # graph of another.
    uuid = json.dumps([str(range_), planned.hint, manager.uuid()])
    questions = None
    if parts:
        (size,) = shapes.symbols
        hints = frozenset(part.hint for part in parts) - {planned.hint}
        questions = Questions(shapes.env, size, hints)
    take_notes()  # what a compile left behind that failed
    try:
        graph = inductor_compile(
            graph_module,
            shapes,
            inputs,
            manager,
            uuid,
            {**planned.options, **(options or {})},
            questions,
        )
    except SplitpointError:
        raise
    except Exception as error:
        if (own := _own_error(error)) is not None:
            raise own from error
        raise CompileError(
            f"Inductor failed on piece {piece.fingerprint} for {range_}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    found = read_assumptions(shapes.env, shapes.symbols, shapes.bounds)
    bare = _bare(graph, {index + len(piece.takes) for index in trusted}, piece)
    call = graph.call if bare is None else bare.call
    steps = None if bare is None else piece_steps(bare.steps, bare.kernels)
    matches = tuple(manager.matches(take_notes()))
    assumed = read(found, piece.dims.names)
    serves: tuple[Range, ...] = ()
    if questions is not None and bare is not None:
        serves = tuple(part.range for part in parts if _is_same(questions, part, assumed))
    return Compiled(call, assumed, matches, bare, steps, graph.kernels, serves)


def extents(piece: Piece, planned: PlannedRange) -> list[Extent]:
    """How long each dynamic dimension of a piece may be in a line of the plan."""
    if piece.dims.is_size_alone:
        return [Extent("size", planned.range.start, planned.range.end, planned.hint)]
    return [Extent(*each) for each in planned.lengths]


def _is_same(questions: Questions, part: PlannedRange, assumed: Sequence[Assumption]) -> bool:
    """Whether the code of a range is what a part of it would be given: as long as it is right
    there, and the part's bounds and hint decide nothing otherwise."""
    sizes = range(part.range.start, part.range.end + 1)
    if part.hint in questions.otherwise or len(valid(assumed, sizes)) < len(sizes):
        return False
    own = range_shapes([Extent("size", part.range.start, part.range.end, part.hint)])
    return not questions.answered_by(own.env)


def piece_steps(
    steps: Mapping[str, Any] | None, kernels: Mapping[str, Callable[..., Any]]
) -> PieceSteps | None:
    """The steps of a piece with its kernels."""
    if steps is None:
        return None
    return PieceSteps(steps, lambda: [kernel_place(kernels[name]) for name in steps["kernels"]])


def _bare(graph: InductorGraph, trusted: Collection[int], piece: Piece) -> Bare | None:
    """The graph without AOTAutograd's run-time wrapper, which costs 10 to 20 us a call, where
    that has nothing to do."""
    if graph.wrapped:
        log.debug("piece %s keeps its wrapper for: %s", piece.fingerprint, graph.wrapped)
        return None
    try:
        wrapper = read_wrapper(graph.source, trusted, graph.mutated, graph.to_align)
        call = wrapper.bind(graph.names)
    except (NotPlain, LookupError, SyntaxError) as error:
        log.debug("piece %s keeps its wrapper: its code has %s", piece.fingerprint, error)
        return None
    steps = None
    texts = lengths_postfix(piece.dims.names)
    try:
        steps = steps_of(wrapper, [texts[name] for name in piece.takes])
    except NoStep as why:
        log.debug("piece %s runs in Python: it has %s", piece.fingerprint, why)
    kernels = {name: graph.names[name] for name in wrapper.kernels}
    return Bare(call, wrapper, kernels, steps, graph.binaries)


def _own_error(error: BaseException | None) -> SplitpointError | None:
    """The error of this package among the causes of one that Inductor wrapped."""
    while error is not None:
        if isinstance(error, SplitpointError):
            return error
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, SplitpointError):
            return inner
        error = error.__cause__ or error.__context__
    return None
