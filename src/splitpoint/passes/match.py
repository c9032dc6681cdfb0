"""What is found of an all-reduce and what follows it: `Match`, or why there is none: `Miss`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from ..collectives.policy import Quant
from .nodes import describe, value


@dataclass(eq=False)
class Miss(Exception):
    """Why an all-reduce does not match, and how many steps did."""

    reason: str
    depth: int = 0

    def __str__(self) -> str:
        return self.reason


@dataclass
class Match:
    """An all-reduce and what follows it, as far as it is one fused operation."""

    reduce: fx.Node
    input: fx.Node
    group: str
    reduced: fx.Node
    """The result of the all-reduce."""
    hidden: int
    residual: fx.Node | None = None
    given_residual: fx.Node | None = None
    """The residual as it is added, where `residual` is what a widening cast took."""
    weight: fx.Node | None = None
    weight_bias: float = 0.0
    eps: float = 0.0
    quant: Quant = "none"
    quant_scale: fx.Node | None = None
    scale_is_inverse: bool = False
    """Whether the operator's scale is the reciprocal of `quant_scale`."""
    sums: list[fx.Node] = field(default_factory=list)
    """Nodes that hold the sum before the norm."""
    norms: list[fx.Node] = field(default_factory=list)
    """Nodes that hold the result of the norm."""
    quantised: fx.Node | None = None
    scales: fx.Node | None = None
    inner: set[fx.Node] = field(default_factory=set)
    """All nodes that the match stands for."""
    note: str = ""
    """Why what follows the norm was left alone, when it looks like a quantisation."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the input."""
        dtype: torch.dtype = value(self.input).dtype
        return dtype

    def outside(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Those of some nodes that something outside the match uses."""
        return [node for node in nodes if any(user not in self.inner for user in node.users)]


def check_order(found: Match, operands: list[fx.Node]) -> None:
    """That no operand follows from what the match computes."""
    seen: set[fx.Node] = set()
    stack = list(operands)
    while stack:
        node = stack.pop()
        if node in found.inner:
            raise Miss(f"an operand follows from its own result, by {describe(node)}", 7)
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
