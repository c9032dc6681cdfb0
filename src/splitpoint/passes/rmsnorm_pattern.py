"""Find all-reduce, residual add, RMSNorm and quantisation in a graph: one pattern, as data.

Each all-reduce is followed through its users, step by step; what may stand at each step is a
table of operators. The first step that fits nothing is the reason why an all-reduce does not
match. Rounding between the steps (casts from and to bf16 and fp16) is looked through: the fused
operator computes in fp32 and rounds the sum and the norm, whether the model rounds there or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..torch_internals.sizes import statically_equal
from .match import Match, Miss, check_order
from .nodes import (
    CASTS,
    FLOATS,
    aliases,
    argument,
    describe,
    last_dim_kept,
    name_of,
    number,
    operand,
    row_of,
    uncast,
    users_of,
    value,
)
from .quantisation import find_quantisation

# --- the operators of each step --------------------------------------------------------

REDUCES: dict[str, Callable[[fx.Node], tuple[Any, str, str]]] = {
    "_c10d_functional::all_reduce": lambda n: (n.args[0], str(n.args[1]), str(n.args[2])),
    "vllm::all_reduce": lambda n: (
        argument(n, 0, "tensor"),
        "sum",
        str(argument(n, 1, "group_name")),
    ),
    "splitpoint::all_reduce": lambda n: (n.args[0], "sum", str(n.kwargs["group"])),
}
"""All-reduces by operator: (input, reduction, name of the group)."""

WAIT = "_c10d_functional::wait_tensor"

Form = Callable[[fx.Node, fx.Node], Any]
"""(node, what came before) to what the step needs to know of it; None when it does not fit."""

SQUARE: dict[str, Form] = {
    "aten::pow.Tensor_Scalar": lambda n, x: True if n.args[1] == 2 else None,
    "aten::mul.Tensor": lambda n, x: True if n.args[0] is n.args[1] else None,
    "aten::square": lambda n, x: True,
}
MEAN: dict[str, Form] = {"aten::mean.dim": last_dim_kept}
EPS: dict[str, Form] = {
    "aten::add.Tensor": lambda n, x: number(operand(n, x)),
    "aten::add.Scalar": lambda n, x: number(n.args[1]),
}
ROOT: dict[str, Form] = {
    "aten::rsqrt": lambda n, x: "multiply",
    "aten::pow.Tensor_Scalar": lambda n, x: "multiply" if n.args[1] == -0.5 else None,
    "aten::sqrt": lambda n, x: "divide",
}
RECIPROCAL: dict[str, Form] = {"aten::reciprocal": lambda n, x: "multiply"}

NORM_OPS: dict[str, Callable[[fx.Node], tuple[Any, Any, Any, Any]]] = {
    "aten::rms_norm": lambda n: (
        n.args[0],
        argument(n, 2, "weight"),
        argument(n, 3, "eps"),
        argument(n, 1, "normalized_shape"),
    ),
    "aten::_fused_rms_norm": lambda n: (
        n.args[0],
        argument(n, 2, "weight"),
        argument(n, 3, "eps"),
        argument(n, 1, "normalized_shape"),
    ),
}
"""RMSNorm as one operator: (input, weight, eps, normalised shape). One with several results
has the norm as the first."""


def find_reduces(graph: fx.Graph) -> list[fx.Node]:
    """The all-reduces of a graph, in its order."""
    return [node for node in graph.nodes if name_of(node) in REDUCES]


# --- following one all-reduce ----------------------------------------------------------


def match(reduce: fx.Node, *, quantise: bool = True) -> Match:
    """Follow an all-reduce as far as it is one operation: to the norm, and with `quantise` on
    to what quantises it.

    Raises:
        Miss: when no RMSNorm of its result follows, or one that cannot be fused.
    """
    source, reduction, group = REDUCES[name_of(reduce)](reduce)
    found = _start(reduce, source, reduction, group)
    attempts = [_with_residual(found, add) for add in _adds(found)] or [found]
    misses = []
    for attempt in attempts:
        try:
            _norm(attempt)
            if quantise:
                find_quantisation(attempt)
            _check_users(attempt)
        except Miss as miss:
            misses.append(miss)
        else:
            return attempt
    raise max(misses, key=lambda miss: miss.depth)


def _start(reduce: fx.Node, source: Any, reduction: str, group: str) -> Match:
    reduced = reduce
    if reduction != "sum":
        raise Miss(f"it reduces by {reduction!r}, not 'sum'")
    if name_of(reduce) == "_c10d_functional::all_reduce":
        (reduced, *others) = reduce.users
        if others or name_of(reduced) != WAIT:
            raise Miss("expected one wait_tensor after it")
    given = value(source)
    if given.dtype not in FLOATS:
        raise Miss(f"its dtype is {given.dtype}")
    hidden = given.shape[-1] if given.dim() > 1 else None
    if not isinstance(hidden, int):
        raise Miss(f"it has shape {tuple(given.shape)}, without a constant hidden dimension")
    found = Match(reduce, source, group, reduced, hidden)
    found.sums = aliases(reduced, hidden)
    found.inner = {reduce, reduced, *found.sums}
    return found


def _adds(found: Match) -> list[fx.Node]:
    """The adds of another tensor of the same shape to the all-reduce's result."""
    adds = []
    for node in users_of(found.sums):
        if name_of(node) != "aten::add.Tensor" or node.kwargs.get("alpha", 1) != 1:
            continue
        a, b = node.args[:2]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            continue
        if (a in found.sums) != (b in found.sums) and _same_shape(a, b):
            adds.append(node)
    return adds


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    one, two = value(a), value(b)
    return len(one.shape) == len(two.shape) and all(map(statically_equal, one.shape, two.shape))


def _with_residual(found: Match, add: fx.Node) -> Match:
    a, b = add.args[:2]
    residual = b if a in found.sums else a
    assert isinstance(residual, fx.Node)
    sums = aliases(add, found.hidden)
    return Match(
        found.reduce,
        found.input,
        found.group,
        found.reduced,
        found.hidden,
        residual=uncast(residual),
        given_residual=residual,
        sums=sums,
        inner={*found.inner, *sums},
    )


def _norm(found: Match) -> None:
    """The RMSNorm of the sum."""
    where = "the residual add" if found.residual is not None else "the all-reduce"
    for node in users_of(found.sums):
        if name_of(node) in NORM_OPS:
            return _norm_op(found, node)
    squares = [
        node
        for source in found.sums
        for node in source.users
        if (form := SQUARE.get(name_of(node))) and form(node, source)
    ]
    if len(squares) != 1:
        seen = ", ".join(map(describe, users_of(found.sums))) or "nothing"
        raise Miss(f"after {where} expected one square (of an RMSNorm), found {seen}", 1)
    (square,) = squares
    found.inner.add(square)
    mean, _ = _step(found, square, MEAN, "a mean over the last dimension, kept", 2)
    shifted, found.eps = _step(found, mean, EPS, "the add of a constant (eps)", 3)
    root, how = _step(found, shifted, ROOT, "a reciprocal square root", 4)
    if how == "divide" and any(name_of(user) in RECIPROCAL for user in root.users):
        root, how = _step(found, root, RECIPROCAL, "a reciprocal", 4)
    product = _product(found, root, how)
    _weight(found, product)
    return None


def _step(
    found: Match, before: fx.Node, forms: Mapping[str, Form], expected: str, depth: int
) -> tuple[fx.Node, Any]:
    """The one user of a node, which must be one of some operators."""
    for node in before.users:
        form = forms.get(name_of(node))
        known = form(node, before) if form is not None else None
        if known is None:
            continue
        if len(before.users) > 1:
            raise Miss(f"{describe(before)} has other users than {node.name}", depth)
        found.inner.add(node)
        return node, known
    seen = ", ".join(map(describe, before.users)) or "nothing"
    raise Miss(f"after {describe(before)} expected {expected}, found {seen}", depth)


def _product(found: Match, root: fx.Node, how: str) -> fx.Node:
    """The sum times its reciprocal root."""
    wanted = "aten::mul.Tensor" if how == "multiply" else "aten::div.Tensor"
    factors = [root, *(u for u in root.users if name_of(u) in CASTS)]
    for factor in factors:
        for node in factor.users:
            operands = node.args[:2]
            if name_of(node) != wanted or (how == "divide" and operands[1] is not factor):
                continue
            other = operand(node, factor)
            if other in found.sums:
                found.inner |= {node, factor}
                if any(user not in found.inner for f in (root, factor) for user in f.users):
                    raise Miss(f"{describe(root)} has other users than {node.name}", 5)
                return node
    seen = ", ".join(map(describe, users_of(factors)))
    raise Miss(f"after {describe(root)} expected its product with the sum, found {seen}", 5)


def _weight(found: Match, product: fx.Node) -> None:
    """The product with the weight, if there is one."""
    scaled = aliases(product, found.hidden)
    for factor in scaled:
        for node in factor.users:
            if name_of(node) != "aten::mul.Tensor" or node.args[0] is node.args[1]:
                continue
            if weight := row_of(operand(node, factor), found.hidden):
                found.inner |= {*scaled, node}
                if others := [u for u in users_of(scaled) if u is not node]:
                    raise Miss(
                        f"the norm before its weight has other users: "
                        f"{', '.join(map(describe, others))}",
                        6,
                    )
                _set_weight(found, weight)
                found.norms = aliases(node, found.hidden)
                found.inner |= {*found.norms}
                return
    found.norms = scaled
    found.inner |= {*scaled}


def _set_weight(found: Match, weight: fx.Node) -> None:
    weight = uncast(weight)
    # 1 + weight, as Gemma writes it. In bf16 the sum rounds, so there it stays what it is.
    if name_of(weight) in ("aten::add.Tensor", "aten::add.Scalar") and (
        value(weight).dtype == torch.float32
    ):
        a, b = weight.args[:2]
        bias, tensor = (number(a), b) if number(a) is not None else (number(b), a)
        if bias is not None and isinstance(tensor, fx.Node) and not weight.kwargs.get("alpha"):
            found.weight_bias = bias
            weight = uncast(tensor)
    found.weight = weight


def _norm_op(found: Match, node: fx.Node) -> None:
    """RMSNorm as one operator."""
    source, weight, eps, shape = NORM_OPS[name_of(node)](node)
    if source not in found.sums or list(shape) != [found.hidden]:
        raise Miss(f"{describe(node)} normalises over {shape}, not the last dimension", 2)
    if eps is None:
        eps = torch.finfo(value(source).dtype).eps
    found.eps, found.weight = float(eps), weight
    found.inner.add(node)
    first = node
    if isinstance(value(node), (tuple, list)):
        items = {u.args[1]: u for u in node.users}
        if set(items) != {0}:
            raise Miss(f"{describe(node)} has other results that are used", 3)
        first = items[0]
    found.norms = aliases(first, found.hidden)
    found.inner |= {*found.norms}


def _check_users(found: Match) -> None:
    """That the fused operator gives all that is used outside the match."""
    if found.residual is not None:
        raw = aliases(found.reduced, found.hidden)
        if others := [u for u in users_of(raw) if u not in found.inner]:
            raise Miss(
                "the all-reduce's result is used besides the residual add: "
                + ", ".join(map(describe, others)),
                7,
            )
        exact = [node for node in found.outside(found.sums) if value(node).dtype == torch.float32]
        if value(found.residual).dtype not in (found.dtype, torch.float32) or any(
            not _is_rounded(node, found.sums, value(found.residual).dtype) for node in exact
        ):
            found.residual = found.given_residual
            assert found.residual is not None
            if (given := value(found.residual).dtype) not in (found.dtype, torch.float32):
                raise Miss(f"the residual is {given}, the all-reduce {found.dtype}", 7)
    holder = found.residual if found.residual is not None else found.input
    for what, nodes, dtype in (
        ("sum", found.sums, value(holder).dtype),
        ("norm", found.norms, found.dtype),
    ):
        for node in found.outside(nodes):
            if not _is_rounded(node, nodes, dtype):
                raise Miss(
                    f"the {what} is used in {value(node).dtype} ({node.name}), the operator "
                    f"gives {dtype}",
                    7,
                )
    operands = [found.residual, found.weight]
    check_order(found, [node for node in operands if node is not None])


def _is_rounded(node: fx.Node, among: list[fx.Node], dtype: torch.dtype) -> bool:
    """Whether a node holds no more digits than a dtype has: by its own, or by what it casts."""
    own = value(node).dtype
    if own == dtype or dtype == torch.float32:
        return True
    source = node.args[0]
    return isinstance(source, fx.Node) and source in among and _is_rounded(source, among, dtype)
