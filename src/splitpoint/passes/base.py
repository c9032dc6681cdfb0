"""`Pass`: a rewrite of one piece's graph, and the range it is asked for."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..errors import NotCompiling, PassError
from ..ranges import Range

_current: ContextVar[Range] = ContextVar("splitpoint_current_range")


def current_range() -> Range:
    """The range whose graph is being compiled; for use inside a pass.

    Raises:
        NotCompiling: outside a compile.
    """
    try:
        return _current.get()
    except LookupError:
        raise NotCompiling(
            "current_range() has a value only while a range compiles: call it inside a pass"
        ) from None


@contextmanager
def compiling(range_: Range) -> Iterator[None]:
    """Make a range the current one."""
    token = _current.set(range_)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class Found:
    """What a pass did in one graph, when it has more to say than how often it matched."""

    matches: int
    notes: tuple[str, ...] = ()
    """What did not match, and why."""
    chosen: tuple[str, ...] = ()
    """What the graph was given, and why; shown in the range's line of the plan."""


class Pass:
    """A rewrite of one piece's graph, for the ranges it applies to.

    A pass sees the graph after AOTAutograd, in ATen operators and free of mutation, before
    Inductor's own post-grad passes. Sizes in it are symbols of the range's own ShapeEnv,
    so that `torch.fx.experimental.symbolic_shapes.statically_known_true(size <= 16)`
    answers for the range.
    """

    asks_torch: bool = False
    """Whether all that a pass knows of the range is what torch so answers (`statically_known_true`
    and its like): no `current_range()`, no bounds, no hints. Ranges that have the same answers may
    then share one compile, for which the pass runs once, over the sizes of them all."""

    @property
    def name(self) -> str:
        """What the plan and the statistics call the pass."""
        return type(self).__name__

    def applies_to(self, range: Range) -> bool:
        """Whether the pass runs for a range. Default: every range."""
        return True

    def settings(self) -> Mapping[str, Any]:
        """Constructor arguments that make an equal pass, as JSON values. Default: none."""
        return {}

    def uuid(self) -> str:
        """What identifies the pass in compile caches: two passes that rewrite differently
        must differ here, in every process alike. Default: a hash of the class's source
        and its settings.
        """
        kind = type(self)
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError) as error:
            raise PassError(
                f"the source of {kind.__qualname__} cannot be read, so its uuid() cannot be "
                f"derived: override uuid() to return a string that changes with the pass"
            ) from error
        text = json.dumps([kind.__module__, kind.__qualname__, source, dict(self.settings())])
        return hashlib.sha256(text.encode()).hexdigest()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"
        )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Pass) and other.uuid() == self.uuid()

    def __hash__(self) -> int:
        return hash((type(self), self.uuid()))

    def __call__(self, graph: fx.Graph) -> int | Found:
        """Rewrite the graph in place and return how many places matched, alone or in a
        `Found`."""
        raise NotImplementedError
