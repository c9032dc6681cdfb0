"""See at the price of a few thousand loads that nothing in module trees was changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from .. import kernels
from ..errors import KernelBuildError
from ..torch_internals.tensors import address_of, have_addresses
from .reached import Reach, dicts_of, ids_of
from .reads import Reads, Unwatchable

log = logging.getLogger("splitpoint")


class ModuleWatch:
    """Compares the dicts and classes of module trees, what leads to these, and tensors, with what
    they were at `renew`.

    Sees attributes, parameters, buffers and submodules that are added, removed or replaced,
    a new `__class__` or `__dict__`, and tensors whose memory, dtype or shape is exchanged. What
    an attribute refers to may change unseen (a list that grows, say).
    """

    def __init__(self, reach: Reach, kind: Callable[[], Any]) -> None:
        self.reach = reach
        self.check: Any = kind()
        """Tells when called whether all is as it was."""

    def renew(self, tensors: Sequence[torch.Tensor], versioned: Collection[int]) -> bool:
        """Take things as they are now; of tensors whose id is in `versioned`, in-place updates
        count as changes too. False, and nothing is taken, when there are no means to watch them:
        this Python's dicts cannot be, or they lie elsewhere."""
        try:
            reached = self.reach()
        except Unwatchable:
            return False
        if not reached.holds(tensors):
            return False
        marked = [(tensor, address_of(tensor), id(tensor) in versioned) for tensor in tensors]
        modules, way = reached.modules, reached.way
        whole, objects = [*dicts_of(modules), *way.whole], [*modules, *way.objects]
        return bool(self.check.renew(whole, objects, way.keyed, way.lists, marked))


def watch(
    reach: Reach, tensors: Sequence[torch.Tensor], versioned: Collection[int] = ()
) -> ModuleWatch | None:
    """A watch over what is reached and tensors in it, as `ModuleWatch.renew` takes them; None
    where there are no means."""
    kind = _kind()
    if kind is None or any(map(_is_opaque, tensors)):
        return None
    made = ModuleWatch(reach, kind)
    return made if made.renew(tensors, versioned) else None


class Rest:
    """Checks facts that a watch over module trees does not see.

    Those whose value follows from a few dicts and objects are left to a watch over these. Where
    one of these changes and all facts hold nevertheless, the watch is made anew; where that
    happens too often, the facts themselves are looked at for a number of calls, which doubles each
    time.

    Args:
        check: whether all facts hold.
        check_rest: makes the check of all facts but those that the given `Reads` came to see.
            Called only while all facts hold, as it goes by what they are now.
        reach: gives the trees.
        tensors: ids of the tensors that are watched, at the moment of asking.
    """

    def __init__(
        self,
        check: Callable[[], bool],
        check_rest: CheckRest,
        reach: Reach,
        tensors: Tensors,
    ) -> None:
        self._check = check
        self._check_rest = check_rest
        self._reach = reach
        self._tensors = tensors
        self._watched: Callable[[], bool] = bool
        self._unwatched: Callable[[], bool] = bool
        self._way: Callable[[], bool] | None = None
        """Whether the trees still lead to the places watched; None when none are."""
        self._patience = PATIENCE
        self._pause = PAUSE
        """Calls that look at the facts themselves, when patience is at its end."""
        self._left = 0
        """Those of them that are still to come."""
        self._modules: tuple[torch.nn.Module, ...] = ()
        """The trees'. A new one may have been read nowhere yet, so no way leads to it."""
        self._take()

    def __call__(self) -> bool:
        """Whether the facts hold."""
        return self._unwatched() and (self._watched() or self._again())

    def renew(self) -> None:
        """Go by the trees as they are now. The facts hold."""
        if self._way is not None and not (self._way() and self._modules == self._reach().modules):
            self._take()

    def _take(self) -> None:
        self._modules = self._reach().modules
        reads = Reads(ids_of(self._modules))
        self._unwatched = self._check_rest(self._tensors(), reads)
        watched, way = watch_reads(reads), watch_reads(reads.way())
        assert watched is not None  # or there would be no watch over the trees
        self._watched, self._way = watched, way

    def _again(self) -> bool:
        if not self._check():
            return False
        self._patience -= 1
        if self._patience > 0:
            self._take()
        else:
            self._unwatched = self._check_rest(self._tensors(), None)
            self._watched, self._way = self._without, None
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return True

    def _without(self) -> bool:
        """In the watch's place while it is given up: what was changing may have come to rest."""
        self._left -= 1
        if self._left <= 0:
            self._patience = 2
            self._take()
        return True


PATIENCE = 4
"""How often a watch over facts is made before it is given up for a while."""

PAUSE, LONGEST_PAUSE = 8, 4096
"""For how many calls, the first time and at most. Making it takes as long as a few checks."""

CheckRest = Callable[[Collection[int], Reads | None], Callable[[], bool]]
Tensors = Callable[[], Collection[int]]


def watch_reads(reads: Reads) -> Callable[[], bool] | None:
    """A function that tells whether all that `reads` noted is as it is now; None where there are
    no means."""
    kind = _kind()
    made: Any = kind() if kind is not None else None
    if made is None or not made.renew(reads.whole, reads.objects, reads.keyed, reads.lists, []):
        return None
    return made  # type: ignore[no-any-return]


def _kind() -> Callable[[], Any] | None:
    if not have_addresses():
        return None
    try:
        return kernels.watch_type()
    except KernelBuildError as error:
        log.info("modules are checked by torch's guards alone: %s", error)
        return None


def _is_opaque(tensor: torch.Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_meta
