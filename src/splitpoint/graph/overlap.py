"""Tensors that overlap in memory while one of them is updated in place: seen, and refused.

A compiled piece takes each of its inputs for memory of its own. Tensors of the module that overlap
when the graph is captured are an exception: there the piece has them as views of one of them, as
far apart as they are. So two things must hold of what a function is given, and are checked where
a graph updates any of its inputs: at each call, that no argument overlaps with another tensor of
which one is updated; and when tensors of the module are bound, that they lie to each other as
they did.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import OverlappingMemory, StateChanged, UnsupportedGraph
from ..torch_internals.tensors import memory_of

# --- whether two tensors share memory --------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The bytes that a tensor is in."""

    start: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""

    @property
    def end(self) -> int:
        """Where the last byte ends."""
        return self.start + self.itemsize * int(extent(self.shape, self.strides))


def extent(shape: Sequence[Any], strides: Sequence[Any]) -> Any:
    """How many elements lie from the first to the last of a tensor that is not empty."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


def place_of(tensor: torch.Tensor) -> Place | None:
    """Where a tensor is; None when it has no memory of its own to look at."""
    if not _is_plain(tensor) or not (start := tensor.data_ptr()) or not tensor.numel():
        return None
    return Place(start, tensor.element_size(), tuple(tensor.shape), tuple(tensor.stride()))


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def share_memory(a: Place, b: Place) -> bool:
    """Whether two tensors have a byte in common. Interleaved ones (even and odd columns) have none;
    where that would take long to tell, the answer is yes."""
    # They do where some index into each leads to the same byte, so for each stride only the
    # difference of the two indices counts. The bytes of an element are a dimension as well.
    reach: dict[int, list[int]] = {}
    for side, place in enumerate((a, b)):
        if 0 in place.shape:
            return False
        steps = [step * place.itemsize for step in place.strides]
        for n, step in zip((*place.shape, place.itemsize), (*steps, 1), strict=True):
            reach.setdefault(step, [0, 0])[side] += n - 1
    terms = [
        (step, -high[1], high[0]) for step, high in sorted(reach.items(), reverse=True) if step
    ]
    return _reaches(b.start - a.start, terms, iter(range(_PATIENCE)))


_PATIENCE = 10_000
"""How many combinations of indices are tried. Ordinary layouts need a few."""


def _reaches(target: int, terms: Sequence[tuple[int, int, int]], patience: Iterator[int]) -> bool:
    """Whether a number is a sum of steps, each taken as often as its bounds allow."""
    if not terms:
        return target == 0
    (step, low, high), rest = terms[0], terms[1:]
    least, most = sum(s * n for s, n, _ in rest), sum(s * n for s, _, n in rest)
    first, last = max(low, -((most - target) // step)), min(high, (target - least) // step)
    return any(
        next(patience, None) is None or _reaches(target - step * times, rest, patience)
        for times in range(first, last + 1)
    )


def _overlaps(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """The pairs among some tensors that share memory."""
    places = [(place, name) for name, each in tensors.items() if (place := place_of(each))]
    near: list[tuple[Place, str]] = []
    for place, name in sorted(places, key=lambda each: each[0].start):
        near = [each for each in near if each[0].end > place.start]
        for other, other_name in near:
            same_device = tensors[other_name].device == tensors[name].device
            if same_device and share_memory(other, place):
                yield other_name, name
        near.append((place, name))


# --- what a graph updates --------------------------------------------------------------


@dataclass(frozen=True)
class Updates:
    """What a graph, or a function, updates in place of what it takes, and what else it takes, by
    the names that it has for them."""

    written: tuple[str, ...]
    arguments: Mapping[str, str]
    """For each argument how many bytes lie from its first to its last, as Python over the size."""
    bound: tuple[str, ...] = ()
    """The module's tensors."""
    together: tuple[tuple[tuple[str, int], ...], ...] = ()
    """Those of them that overlap, with one that is updated among them: the name of each, and how
    many bytes it starts after the first."""

    def renamed(self, names: Mapping[str, str]) -> Updates:
        """The same by other names."""
        return Updates(
            tuple(names[name] for name in self.written),
            {names[name]: nbytes for name, nbytes in self.arguments.items()},
            tuple(names[name] for name in self.bound),
            tuple(tuple((names[name], at) for name, at in group) for group in self.together),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Updates:
        """What `to_json` made."""
        together = tuple(tuple((name, at) for name, at in group) for group in data["together"])
        return cls(tuple(data["written"]), data["arguments"], tuple(data["bound"]), together)


def updates_of(
    written: Collection[str], nbytes: Mapping[str, str], bound: Mapping[str, torch.Tensor]
) -> Updates | None:
    """What a graph updates; None when it updates none of its inputs.

    Args:
        written: names of the inputs that it does update.
        nbytes: `Updates.arguments`.
        bound: the tensors of the module that it takes, as they are.

    Raises:
        UnsupportedGraph: for tensors of the module that overlap, with one that is updated among
            them, without torch knowing of it.
    """
    if not written:
        return None
    groups: list[list[str]] = []
    for pair in _overlaps(bound):
        if {*pair} & {*written} and memory_of(bound[pair[0]]) != memory_of(bound[pair[1]]):
            raise UnsupportedGraph(
                f"{pair[0]} and {pair[1]} overlap in memory and one is updated in place, but they "
                f"are not views of one tensor: make them views (x[:2], as_strided), or copies"
            )
        touched = [group for group in groups if {*group} & {*pair}]
        groups = [group for group in groups if group not in touched]
        groups.append(list(dict.fromkeys([*(n for group in touched for n in group), *pair])))
    return Updates(
        tuple(written),
        nbytes,
        tuple(bound),
        tuple(
            tuple((name, bound[name].data_ptr() - bound[group[0]].data_ptr()) for name in group)
            for group in groups
            if {*group} & {*written}
        ),
    )


# --- the checks ------------------------------------------------------------------------

Spans = tuple[list[int], list[int]]
"""Where stretches of memory start and where they end, ascending and apart from each other."""


class Apart:
    """Sees to it that what one function updates in place lies where compiled code expects it.

    Args:
        updates: what it updates and takes: "a" with the index of an argument, "w" with that of a
            tensor of the module.
        arguments: what messages call the arguments.
        owner: the module, for the names of its tensors.
    """

    def __init__(
        self, updates: Updates, arguments: Sequence[str], owner: torch.nn.Module | None
    ) -> None:
        self.updates = updates
        self.arguments = arguments
        self.owner = owner
        self.bound: dict[str, torch.Tensor] = {}
        self.addresses: dict[str, int] = {}
        self.beside_written: Spans = [], []
        """What must not overlap with an argument that is updated: all tensors of the module."""
        self.beside_read: Spans = [], []
        """What must not overlap with other arguments: those of the tensors that are updated."""

    def bind(self, tensors: Sequence[torch.Tensor]) -> None:
        """Go by the tensors that the module holds now, in the order of their indices.

        Raises:
            StateChanged: when they do not lie to each other as they did at capture.
        """
        self._bind({name: tensors[int(name[1:])] for name in self.updates.bound})

    def follow(self) -> None:
        """See whether the tensors bound were given other memory.

        Raises:
            StateChanged: as `bind`.
        """
        if _addresses(self.bound) != self.addresses:
            self._bind(self.bound)

    def _bind(self, bound: dict[str, torch.Tensor]) -> None:
        addresses = _addresses(bound)
        if addresses != self.addresses:
            self._check(bound, addresses)
            updated = {name: each for name, each in bound.items() if name in self.updates.written}
            self.beside_written, self.beside_read = _spans(bound), _spans(updated)
        self.bound, self.addresses = bound, addresses

    def _check(self, bound: dict[str, torch.Tensor], addresses: Mapping[str, int]) -> None:
        group_of: dict[str, int] = {}
        for index, group in enumerate(self.updates.together):
            first = group[0][0]
            for name, ahead in group:
                group_of[name] = index
                if addresses.get(name, 0) - addresses.get(first, 0) != ahead:
                    self._changed(bound, first, name, "no longer overlap in memory as they did")
        for a, b in _overlaps(bound):
            if self._updated(a, b) and not (a in group_of and group_of[a] == group_of.get(b)):
                self._changed(bound, a, b, "overlap in memory now")

    def _changed(self, bound: Mapping[str, torch.Tensor], a: str, b: str, how: str) -> None:
        raise StateChanged(
            f"the module is not as it was when it was captured: {self._called(a, bound)} and "
            f"{self._called(b, bound)} {how}, and one is updated in place. Change it back, or call "
            f"reset() to capture and compile anew"
        )

    def lines(self, constant: Callable[[object], str], follow: bool) -> list[str]:
        """Python for the start of the function.

        Args:
            constant: gives an object a name there.
            follow: whether tensors of the module may be given other memory unseen.
        """
        own, before = constant(self), constant(bisect_left)
        arguments = list(self.updates.arguments)
        at = dict(zip(arguments, range(len(arguments)), strict=True))
        tests = []
        pairs = [(a, b) for a in arguments for b in arguments[: at[a]] if self._updated(a, b)]
        if len(pairs) > _MOST_PAIRS:
            each = ", ".join(f"(b{at[a]}, e{at[a]}, {self._updated(a)})" for a in arguments)
            tests.append(f"{constant(_cross)}([{each}])")
        else:
            tests += [f"b{at[a]} < e{at[b]} and b{at[b]} < e{at[a]}" for a, b in pairs]
        for a in arguments:
            beside = "beside_written" if self._updated(a) else "beside_read"
            if self.updates.bound if self._updated(a) else self._updated(*self.updates.bound):
                found = f"(i := {before}((s := {own}.{beside})[0], e{at[a]}))"
                tests.append(f"{found} and s[1][i - 1] > b{at[a]}")
        if not tests:
            return []
        lines = [f"{own}.follow()"] if follow and self.updates.bound else []
        for a in arguments:
            i = at[a]
            lines.append(f"e{i} = (b{i} := {a}.data_ptr()) + {self.updates.arguments[a]}")
        return [*lines, f"if {' or '.join(tests)}: {own}.refuse({', '.join(arguments)})"]

    def refuse(self, *arguments: torch.Tensor) -> None:
        """Look closely at arguments that come near what is updated.

        Raises:
            OverlappingMemory: when they do overlap with it.
        """
        given = dict(zip(self.updates.arguments, arguments, strict=True))
        everything = self.bound | given
        for a, b in _overlaps(everything):
            if self._updated(a, b) and (a in given or b in given):
                changed, other = (a, b) if self._updated(a) else (b, a)
                copied = self._called(other if other in given else changed, everything)
                raise OverlappingMemory(
                    f"{self._called(changed, everything)}, which the model updates in place, and "
                    f"{self._called(other, everything)} overlap in memory, but compiled code takes "
                    f"each for memory of its own: pass a copy ({copied}.clone()), or update it out "
                    f"of place"
                )

    def _updated(self, *names: str) -> bool:
        """Whether one of some tensors is updated."""
        return any(name in self.updates.written for name in names)

    def _called(self, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
        if name in self.updates.arguments:
            index = int(name[1:])
            return self.arguments[index] if index < len(self.arguments) else name
        tensor = tensors[name]
        if self.owner is not None:
            for named in (self.owner.named_buffers, self.owner.named_parameters):
                for path, each in named(remove_duplicate=False):
                    if each is tensor:
                        return f"the module's {path}"
        return f"a tensor {list(tensor.shape)} that the model holds"


_MOST_PAIRS = 10
"""Pairs of arguments that are compared one by one."""


def _addresses(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: each.data_ptr() for name, each in tensors.items() if _is_plain(each)}


def _spans(tensors: Mapping[str, torch.Tensor]) -> Spans:
    starts: list[int] = []
    ends: list[int] = []
    places = [place for each in tensors.values() if (place := place_of(each))]
    for place in sorted(places, key=lambda place: place.start):
        if ends and place.start <= ends[-1]:
            ends[-1] = max(ends[-1], place.end)
        else:
            starts.append(place.start)
            ends.append(place.end)
    return starts, ends


def _cross(spans: list[tuple[int, int, bool]]) -> bool:
    """Whether two of some stretches meet of which one is updated."""
    spans.sort()
    end = end_of_updated = 0
    for start, stop, updated in spans:
        if start < (end if updated else end_of_updated):
            return True
        end = max(end, stop)
        if updated:
            end_of_updated = max(end_of_updated, stop)
    return False
