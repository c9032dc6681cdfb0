"""What a capture reached that is watched as a whole: module trees, and the places that lead there.

A compiled module reaches its own tree. A compiled function reaches modules by its closure, its
globals, and objects in them; each of these places may be set to another module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .reads import Reads, Unwatchable


@dataclass(frozen=True)
class Reached:
    """Modules, tensors that lie in none of them, and the places that lead to both."""

    modules: tuple[torch.nn.Module, ...] = ()
    """All of each tree, once."""
    tensors: tuple[torch.Tensor, ...] = ()
    way: Reads = field(default_factory=Reads)

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether all of these tensors lie here, so that others in their place are noticed."""
        found = set(map(id, self.tensors))
        for module in self.modules:
            found.update(map(id, module._parameters.values()), map(id, module._buffers.values()))
        return found.issuperset(map(id, tensors))


Reach = Callable[[], Reached]
"""What is reached at the moment.

Raises:
    Unwatchable: when a place no longer leads where it can be watched.
"""


def reach_tree(owner: torch.nn.Module | None) -> Reach:
    """A module's own tree, to which nothing has to lead; nothing where there is no module."""
    return lambda: Reached(modules_of([] if owner is None else [owner]))


def reach_by(ways: Sequence[str], names: Callable[[], Mapping[str, Any]]) -> Reach:
    """What expressions lead to: modules, whose trees count, and tensors."""

    def reach() -> Reached:
        way, known = Reads(), names()
        found = [way.follow(code, known) for code in ways]
        modules = modules_of(each for each in found if isinstance(each, torch.nn.Module))
        tensors = tuple(each for each in found if isinstance(each, torch.Tensor))
        return Reached(modules, tensors, way)

    return reach


def can_follow(way: str, names: Mapping[str, Any]) -> bool:
    """Whether what an expression leads to is decided by places that can be watched."""
    try:
        Reads().follow(way, names)
    except Unwatchable:
        return False
    return True


def modules_of(roots: Iterable[torch.nn.Module]) -> tuple[torch.nn.Module, ...]:
    """All modules of some trees, each once."""
    found: dict[int, torch.nn.Module] = {}
    for root in roots:
        found.update((id(each), each) for each in root.modules())
    return tuple(found.values())


def dicts_of(modules: Iterable[torch.nn.Module]) -> Iterator[dict[str, Any]]:
    """The dicts that hold what modules have."""
    for module in modules:
        own = vars(module)
        yield from (own, own["_parameters"], own["_buffers"], own["_modules"])


def ids_of(modules: Sequence[torch.nn.Module]) -> set[int]:
    """The ids of modules and of the dicts that hold what they have."""
    return {*map(id, modules), *map(id, dicts_of(modules))}
