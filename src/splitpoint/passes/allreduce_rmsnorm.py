"""Replace all-reduce, residual add, RMSNorm and quantisation by one fused operator, where the
policy says that it pays."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import fx

from ..collectives import ops
from ..collectives.policy import Policy
from ..errors import InvalidField
from ..torch_internals.graphs import add_call
from .base import Found
from .collective import Choice, CollectivePass, shape_of, substitute
from .match import Match
from .nodes import value

Algorithm = Literal["policy", "auto", "one_shot", "two_shot", "reference"]


class AllReduceRMSNorm(CollectivePass):
    """Fuse all-reduce + residual add + RMSNorm + quantisation for the ranges in which the
    policy gives their bytes to a fused algorithm.

    An all-reduce that does not match is noted with the first step that did not. A match stays
    as it is where the policy prefers separate kernels for the range, or where the group has no
    workspace that would serve the fused operator.

    Args:
        policy: the policy, or its JSON text; seeds from public figures complete it.
        algorithm: "policy", or the operator's algorithm for every match and range, without
            asking the policy. "reference" needs no workspace: it is the group's own all-reduce
            and torch operations.

    Raises:
        InvalidPolicy: when the text is none.
        InvalidField: for another algorithm.
    """

    def __init__(self, policy: Policy | str | None = None, algorithm: Algorithm = "policy") -> None:
        super().__init__(policy)
        if algorithm not in get_args(Algorithm):
            raise InvalidField(
                f"algorithm must be one of {', '.join(get_args(Algorithm))}, got {algorithm!r}"
            )
        self.algorithm = algorithm

    def settings(self) -> Mapping[str, Any]:
        """The policy as JSON text, unless it is that of public figures, and the algorithm."""
        return {**super().settings(), "algorithm": self.algorithm}

    def __call__(self, graph: fx.Graph) -> Found:
        """Rewrite the graph in place."""
        ops.register()
        return super().__call__(graph)

    def choose(self, found: Match) -> Choice:
        """The operator's algorithm for a match, as configured or by the policy."""
        if self.algorithm != "policy":
            return Choice(f"{self.algorithm}, as configured", self.algorithm)
        decision = self.ask_policy(found)
        what = f"{' and '.join(decision.algorithms)}, {decision.why}"
        return Choice(what, decision.algorithm if decision.fused else None)

    def replace(self, found: Match, algorithm: str) -> None:
        """Put the fused operator in the place of a match."""
        graph = found.reduce.graph
        aten = torch.ops.aten
        with graph.inserting_before(found.reduce):
            whole = found.sums[0]
            given = value(whole)
            x, residual, weight, scale = (
                found.input,
                found.residual,
                found.weight,
                found.quant_scale,
            )
            if value(x).dim() != given.dim():
                x = add_call(graph, aten.reshape.default, x, shape_of(given))
            if weight is None:
                weight = add_call(
                    graph,
                    aten.full.default,
                    [found.hidden],
                    1.0,
                    dtype=found.dtype,
                    device=given.device,
                )
            if scale is not None and found.scale_is_inverse:
                scale = add_call(graph, aten.reciprocal.default, scale)
            outputs = {
                index: nodes
                for index, nodes in enumerate(
                    (
                        found.outside(found.norms),
                        found.outside(found.sums),
                        [found.quantised] if found.quantised else [],
                        [found.scales] if found.scales else [],
                    )
                )
                if nodes
            }
            fused = self._call(graph, found, (x, residual, weight, scale), outputs, algorithm)
            for index, nodes in outputs.items():
                substitute(nodes, found, add_call(graph, operator.getitem, fused, index))

    @staticmethod
    def _call(
        graph: fx.Graph,
        found: Match,
        tensors: tuple[fx.Node, fx.Node | None, fx.Node, fx.Node | None],
        outputs: Collection[int],
        algorithm: str,
    ) -> fx.Node:
        """The operator that gives these of norm, sum, quantised and scales."""
        operator = torch.ops.splitpoint.allreduce_rmsnorm
        if set(outputs) == {0, 1}:
            x, residual, weight, _ = tensors
            return add_call(
                graph,
                operator.both,
                x,
                residual,
                weight,
                found.group,
                found.eps,
                found.weight_bias,
                algorithm,
            )
        return add_call(
            graph,
            operator.default,
            *tensors,
            group=found.group,
            eps=found.eps,
            weight_bias=found.weight_bias,
            quant=found.quant,
            want_norm=0 in outputs,
            want_residual=1 in outputs,
            algorithm=algorithm,
        )
