"""Whether a module, and all else that a capture read, is as it was when it was captured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .reached import Reach, reach_tree
from .watch import CheckRest, ModuleWatch, Rest, watch

Around = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Held:
    """That a dict of the module tree holds an object under a key: a bound tensor, or a
    submodule on the way to one. While all of these are true, the tensors bound are those
    that the module has."""

    holder: dict[str, Any]
    key: str
    value: object


@dataclass
class ModuleState:
    """What one graph relies on of the module: the tensors that it holds, and what tracing read.

    A watch over the module tree, or over all trees that a function reached, sees at each call, at
    the price of a few thousand loads, what most of `check` would say; where there are no means for
    one, `check` itself is called.
    """

    owner: torch.nn.Module | None = None
    """The module whose tree may hold the tensors bound."""
    fetch: Callable[[], list[Any]] = list
    """The tensors that the graph reads, as the module holds them now."""
    check: Callable[[], bool] = lambda: True
    """Whether all else is as it was."""
    check_rest: CheckRest | None = None
    """Makes the check of what a watch does not see. Graphs with equal ones share their `rest`."""
    explain: Callable[[], str] = str
    """What no longer is as it was."""
    check_facts: Callable[[], bool] | None = None
    """What of `check` does not depend on which tensors are bound, where that can be told."""
    reach: Reach | None = None
    """What the watch is over; the owner's tree unless something else is given."""
    bound: list[Any] = field(default_factory=list, init=False)
    """The tensors that are bound."""
    held: tuple[Held, ...] | None = field(default=(), init=False)
    """What to compare to notice that the module holds others; None when its tree does not hold
    all of them."""
    watch: ModuleWatch | None = field(default=None, init=False)
    rest: Rest | None = field(default=None, init=False)
    """What of `check` the watch does not see, where there is one."""

    def __post_init__(self) -> None:
        self.bind()

    def bind(self) -> None:
        """Take the tensors that the module holds now."""
        self.bound = self.fetch()
        self.held = held(self.owner, self.bound)

    def around(self, around: Around) -> ModuleState:
        """The same with something done around each check."""
        return replace(
            self,
            check=around(self.check),
            explain=around(self.explain),
            check_rest=None if self.check_rest is None else around(self.check_rest),
            check_facts=None if self.check_facts is None else around(self.check_facts),
        )

    def checks(
        self, versioned: Collection[int], others: Iterable[ModuleState]
    ) -> tuple[tuple[Callable[[], bool], ...], tuple[Held, ...] | None]:
        """What to call at each call of the graph, and what to compare: the watch and what it does
        not see, and nothing; or `check`, and what is held.

        Args:
            versioned: ids of tensors of which updates in place count as changes.
            others: the states of the program's other graphs.
        """
        if self.watch is None and self.check_rest is not None:
            self.watch = watch(self._reach(), self.bound, versioned)
            if self.watch is not None:
                self.rest = self._make_rest(others)
        if self.watch is None or self.rest is None:
            return (self.check,), self.held
        return (self.watch.check, self.rest), ()

    def _make_rest(self, others: Iterable[ModuleState]) -> Rest:
        assert self.check_rest is not None
        for other in others:
            if other.rest is not None and other.check_rest == self.check_rest:
                return other.rest
        check = self.check_facts or self.check
        with torch.no_grad():
            return Rest(check, self.check_rest, self._reach(), lambda: set(map(id, self.bound)))

    def _reach(self) -> Reach:
        return self.reach or reach_tree(self.owner)

    def renew(self, versioned: Collection[int]) -> None:
        """Have the watch go by the module as it is now, which is as it was captured."""
        if self.watch is not None:
            self.watch.renew(self.bound, versioned)
        if self.rest is not None:
            self.rest.renew()


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
