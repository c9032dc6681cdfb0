"""What the passes over all-reduce + RMSNorm share: the walk over a graph, and decisions."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..collectives import admission
from ..collectives.policy import Decision, Key, Policy, seed_policy
from ..torch_internals import distributed
from ..torch_internals.graphs import add_call, sort_graph
from ..torch_internals.sizes import statically_equal
from . import match as match_module
from . import nodes, quantisation, rmsnorm_pattern
from .base import Found, Pass, current_range
from .match import Match, Miss
from .nodes import value
from .rmsnorm_pattern import find_reduces, match


@dataclass(frozen=True)
class Choice:
    """What a match is given."""

    what: str
    """For the plan: the algorithm, and why."""
    algorithm: str | None
    """None leaves the graph as it is."""


class CollectivePass(Pass):
    """A pass over each all-reduce that a norm follows, in the graph's order.

    The order of a graph is the same on all ranks, and so is what decides: the policy, the
    groups and their workspaces.
    """

    quantise = True
    """Whether the match goes on to what quantises the norm."""

    def __init__(self, policy: Policy | str | None) -> None:
        self._given = Policy.from_json(policy) if isinstance(policy, str) else policy or Policy()
        self.policy = self._given.over(seed_policy())

    def settings(self) -> Mapping[str, Any]:
        """The policy as JSON text, unless it is that of public figures."""
        return {"policy": self._given.to_json()} if self._given.entries else {}

    def uuid(self) -> str:
        """A hash of the code, the settings, and what else decides: the seeds, and the groups
        with what serves them."""
        patterns = (rmsnorm_pattern, quantisation, match_module, nodes)
        modules = (*patterns, sys.modules[__name__], sys.modules[type(self).__module__])
        state = [
            type(self).__qualname__,
            *map(inspect.getsource, modules),
            self.policy.to_json(),
            dict(self.settings()),
            admission.state(),
        ]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def choose(self, found: Match) -> Choice:
        """What to give a match."""
        raise NotImplementedError

    def replace(self, found: Match, algorithm: str) -> None:
        """Rewrite a match."""
        raise NotImplementedError

    def __call__(self, graph: fx.Graph) -> Found:
        """Rewrite the graph in place."""
        notes: list[str] = []
        chosen: list[str] = []
        matches = 0
        for reduce in find_reduces(graph):
            try:
                found = match(reduce, quantise=self.quantise)
            except Miss as miss:
                notes.append(f"{reduce.name} is left alone: {miss}")
                continue
            if found.note:
                notes.append(f"{reduce.name}: its quantisation is left alone: {found.note}")
            choice = self.choose(found)
            chosen.append(choice.what)
            if choice.algorithm is not None:
                self.replace(found, choice.algorithm)
                _erase(graph, found)
                matches += 1
        if matches:
            sort_graph(graph)
        return Found(matches, tuple(notes), tuple(dict.fromkeys(chosen)))

    def ask_policy(self, found: Match) -> Decision:
        """What the policy says of a match for the current range."""
        given = value(found.input)
        key = Key(
            admission.device_key(given.device),
            distributed.group_of(found.group).size(),
            str(found.dtype).removeprefix("torch."),
            found.residual is not None,
            found.quant,
            found.hidden,
        )
        admitted = admission.admitted(found.group, given.device)
        return self.policy.decide(key, found.dtype.itemsize, current_range(), admitted)


def _erase(graph: fx.Graph, found: Match) -> None:
    for node in reversed(list(graph.nodes)):
        if node in found.inner and not node.users:
            graph.erase_node(node)


def like(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    """A node in the shape and dtype of another one, which has the same elements."""
    own, wanted = value(node), value(target)
    if own.dtype != wanted.dtype:
        node = add_call(graph, torch.ops.prims.convert_element_type.default, node, wanted.dtype)
    if len(own.shape) != len(wanted.shape) or not all(
        map(statically_equal, own.shape, wanted.shape)
    ):
        node = add_call(graph, torch.ops.aten.reshape.default, node, shape_of(wanted))
    return node


def shape_of(given: torch.Tensor) -> list[int]:
    """A shape as arguments of a graph; one dimension of it may be symbolic."""
    return [-1 if isinstance(size, torch.SymInt) else size for size in given.shape]


def substitute(nodes: list[fx.Node], found: Match, source: fx.Node) -> None:
    """Make what is outside a match use `source`, cast and reshaped, instead of some nodes."""
    graph = source.graph
    for node in nodes:
        made = like(graph, source, node)
        node.replace_all_uses_with(made, lambda user: user not in found.inner)
