"""Find all-reduce, residual add, RMSNorm and quantisation in a graph: one pattern, as data.

Each all-reduce is followed through its users, step by step; what may stand at each step is a
table of operators. The first step that fits nothing is the reason why an all-reduce does not
match. Rounding between the steps (casts from and to bf16 and fp16) is looked through: the fused
operator computes in fp32 and rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..collectives.policy import Quant

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


@dataclass(frozen=True)
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
    """Whether values are multiplied by `quant_scale` instead of divided."""
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
CASTS = frozenset({"prims::convert_element_type", "aten::_to_copy"})
VIEWS = frozenset(
    {"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::unsqueeze", "aten::squeeze.dim"}
)

Form = Callable[[fx.Node, fx.Node], Any]
"""(node, what came before) to what the step needs to know of it; None when it does not fit."""


def _operand(node: fx.Node, before: fx.Node) -> Any:
    """The other operand of a commutative operator."""
    a, b = node.args[:2]
    return b if a is before else a


def _number(x: object) -> float | None:
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def _last_dim_kept(node: fx.Node, before: fx.Node) -> bool | None:
    dims: Any = argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    rank = value(before).dim()
    return True if [d % rank for d in dims] == [rank - 1] and argument(node, 2, "keepdim") else None


SQUARE: dict[str, Form] = {
    "aten::pow.Tensor_Scalar": lambda n, x: True if n.args[1] == 2 else None,
    "aten::mul.Tensor": lambda n, x: True if n.args[0] is n.args[1] else None,
    "aten::square": lambda n, x: True,
}
MEAN: dict[str, Form] = {"aten::mean.dim": _last_dim_kept}
EPS: dict[str, Form] = {
    "aten::add.Tensor": lambda n, x: _number(_operand(n, x)),
    "aten::add.Scalar": lambda n, x: _number(n.args[1]),
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


# --- small readings of nodes -----------------------------------------------------------


def value(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta.get("val")


def name_of(node: fx.Node) -> str:
    """The operator a node calls, without a default overload."""
    return _torch.op_name(node.target) if node.op == "call_function" else ""


def argument(node: fx.Node, index: int, name: str) -> Any:
    """A positional or named argument of a node; None when it was left out."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def describe(node: fx.Node) -> str:
    """A node as a reader of a report knows it."""
    if node.op == "output":
        return "the end of the piece"
    return f"{name_of(node) or node.op} ({node.name})"


def find_reduces(graph: fx.Graph) -> list[fx.Node]:
    """The all-reduces of a graph, in its order."""
    return [node for node in graph.nodes if name_of(node) in REDUCES]


def _is_transparent(node: fx.Node, hidden: int) -> bool:
    """Whether a node holds the same numbers, up to rounding and the shape before the last
    dimension, as what it takes."""
    name, own = name_of(node), value(node)
    if not isinstance(own, torch.Tensor) or own.dtype not in FLOATS:
        return False
    if name in CASTS:
        return True
    return (
        name in VIEWS
        and own.dim() > 0
        and _torch.statically_equal(own.shape[-1], hidden)
        # One unknown dimension can be written as -1 when results get their shape back.
        and sum(isinstance(size, torch.SymInt) for size in own.shape) <= 1
    )


def _aliases(node: fx.Node, hidden: int) -> list[fx.Node]:
    """A node and what only casts or reshapes it, in the graph's order."""
    found = [node]
    for each in found:
        found += [u for u in each.users if _is_transparent(u, hidden) and u not in found]
    return found


def _uncast(node: fx.Node) -> fx.Node:
    """What a widening cast took: the same numbers in fewer bytes."""
    while name_of(node) in CASTS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own, given = value(node).dtype, value(source).dtype
        if given not in FLOATS or torch.promote_types(own, given) != own:
            return node
        node = source
    return node


def _users(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The users of some nodes that are not among them, in order."""
    among = list(nodes)
    return list(dict.fromkeys(u for node in among for u in node.users if u not in among))


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
                _quantisation(attempt)
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
    found.sums = _aliases(reduced, hidden)
    found.inner = {reduce, reduced, *found.sums}
    return found


def _adds(found: Match) -> list[fx.Node]:
    """The adds of another tensor of the same shape to the all-reduce's result."""
    adds = []
    for node in _users(found.sums):
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
    return len(one.shape) == len(two.shape) and all(
        map(_torch.statically_equal, one.shape, two.shape)
    )


def _with_residual(found: Match, add: fx.Node) -> Match:
    a, b = add.args[:2]
    residual = b if a in found.sums else a
    assert isinstance(residual, fx.Node)
    sums = _aliases(add, found.hidden)
    return Match(
        found.reduce,
        found.input,
        found.group,
        found.reduced,
        found.hidden,
        residual=_uncast(residual),
        given_residual=residual,
        sums=sums,
        inner={*found.inner, *sums},
    )


def _norm(found: Match) -> None:
    """The RMSNorm of the sum."""
    where = "the residual add" if found.residual is not None else "the all-reduce"
    for node in _users(found.sums):
        if name_of(node) in NORM_OPS:
            return _norm_op(found, node)
    squares = [
        node
        for source in found.sums
        for node in source.users
        if (form := SQUARE.get(name_of(node))) and form(node, source)
    ]
    if len(squares) != 1:
        seen = ", ".join(map(describe, _users(found.sums))) or "nothing"
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
            other = _operand(node, factor)
            if other in found.sums:
                found.inner |= {node, factor}
                if any(user not in found.inner for f in (root, factor) for user in f.users):
                    raise Miss(f"{describe(root)} has other users than {node.name}", 5)
                return node
    seen = ", ".join(map(describe, _users(factors)))
    raise Miss(f"after {describe(root)} expected its product with the sum, found {seen}", 5)


def _weight(found: Match, product: fx.Node) -> None:
    """The product with the weight, if there is one."""
    scaled = _aliases(product, found.hidden)
    for factor in scaled:
        for node in factor.users:
            if name_of(node) != "aten::mul.Tensor" or node.args[0] is node.args[1]:
                continue
            if weight := _row(_operand(node, factor), found.hidden):
                found.inner |= {*scaled, node}
                if others := [u for u in _users(scaled) if u is not node]:
                    raise Miss(
                        f"the norm before its weight has other users: "
                        f"{', '.join(map(describe, others))}",
                        6,
                    )
                _set_weight(found, weight)
                found.norms = _aliases(node, found.hidden)
                found.inner |= {*found.norms}
                return
    found.norms = scaled
    found.inner |= {*scaled}


def _row(node: object, hidden: int) -> fx.Node | None:
    """The [hidden] tensor that an operand is, or is a view of."""
    while isinstance(node, fx.Node) and value(node).dim() != 1:
        node = node.args[0] if name_of(node) in (*VIEWS, "aten::expand") else None
    if isinstance(node, fx.Node) and _torch.statically_equal(value(node).shape[0], hidden):
        return node
    return None


def _set_weight(found: Match, weight: fx.Node) -> None:
    weight = _uncast(weight)
    # 1 + weight, as Gemma writes it. In bf16 the sum rounds, so there it stays what it is.
    if name_of(weight) in ("aten::add.Tensor", "aten::add.Scalar") and (
        value(weight).dtype == torch.float32
    ):
        a, b = weight.args[:2]
        number, tensor = (_number(a), b) if _number(a) is not None else (_number(b), a)
        if number is not None and isinstance(tensor, fx.Node) and not weight.kwargs.get("alpha"):
            found.weight_bias = number
            weight = _uncast(tensor)
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
    found.norms = _aliases(first, found.hidden)
    found.inner |= {*found.norms}


def _check_users(found: Match) -> None:
    """That the fused operator gives all that is used outside the match."""
    if found.residual is not None:
        raw = _aliases(found.reduced, found.hidden)
        if others := [u for u in _users(raw) if u not in found.inner]:
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
    _check_order(found, [node for node in operands if node is not None])


def _is_rounded(node: fx.Node, among: list[fx.Node], dtype: torch.dtype) -> bool:
    """Whether a node holds no more digits than a dtype has: by its own, or by what it casts."""
    own = value(node).dtype
    if own == dtype or dtype == torch.float32:
        return True
    source = node.args[0]
    return isinstance(source, fx.Node) and source in among and _is_rounded(source, among, dtype)


def _check_order(found: Match, operands: list[fx.Node]) -> None:
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


# --- quantisation ----------------------------------------------------------------------


def _quantisation(found: Match) -> None:
    """What quantises the norm, if it is one that the operator knows; else a note."""
    casts = [
        node
        for node in found.reduce.graph.nodes
        if name_of(node) in CASTS and value(node).dtype == FP8
    ]
    for cast in casts:
        try:
            if _fp8(found, cast):
                return
        except Miss as miss:
            found.note = str(miss)


def _fp8(found: Match, cast: fx.Node) -> bool:
    """Match `(norm / scale).clamp(-448, 448).to(fp8)`, backwards from the cast; False when the
    cast is of something else."""
    chain = [cast]
    node = cast.args[0]
    limits: dict[str, float] = {}
    while isinstance(node, fx.Node) and (bounds := _clamp(node)):
        chain.append(node)
        limits |= bounds
        node = node.args[0]
    while isinstance(node, fx.Node) and name_of(node) in CASTS and node not in found.norms:
        chain.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or name_of(node) not in (
        "aten::mul.Tensor",
        "aten::div.Tensor",
    ):
        return False
    a, b = node.args[:2]
    inverse = name_of(node) == "aten::mul.Tensor"
    if inverse and b in found.norms:
        a, b = b, a
    if a not in found.norms:
        return False
    if limits != {"min": -FP8_LARGEST, "max": FP8_LARGEST}:
        raise Miss(f"fp8 of the norm without a clamp to ±448 ({cast.name})")
    if not isinstance(b, fx.Node):
        raise Miss(f"fp8 of the norm with a constant scale ({node.name})")
    chain.append(node)
    for inner, user in zip(chain[1:], chain, strict=False):
        if set(inner.users) != {user}:
            raise Miss(f"{describe(inner)} has other users than {user.name}")
    if _is_scalar(value(b)):
        _check_order(found, [b])
        found.quant, found.quant_scale, found.scale_is_inverse = "fp8_static", b, inverse
    else:
        chain += _token_scale(found, b, inverse)
        found.quant = "fp8_token"
    found.quantised = cast
    found.inner |= {*chain}
    return True


def _is_scalar(given: Any) -> bool:
    return (
        isinstance(given, torch.Tensor)
        and given.dtype == torch.float32
        and all(_torch.statically_equal(n, 1) for n in given.shape)
    )


def _clamp(node: fx.Node) -> dict[str, float]:
    """The limits of a clamp with constants; nothing for other nodes."""
    name = name_of(node)
    if name == "aten::clamp_min":
        given = {"min": node.args[1]}
    elif name == "aten::clamp_max":
        given = {"max": node.args[1]}
    elif name == "aten::clamp":
        given = {"min": argument(node, 1, "min"), "max": argument(node, 2, "max")}
    else:
        return {}
    return {side: n for side, limit in given.items() if (n := _number(limit)) is not None}


def _token_scale(found: Match, scale: fx.Node, inverse: bool) -> list[fx.Node]:
    """Match `amax(abs(norm), -1, keepdim) / 448`, with a floor or without, backwards from the
    scale of each token."""
    chain: list[fx.Node] = []
    divisor, floor = 1.0, 0.0
    node: Any = scale
    if inverse:
        if name_of(node) != "aten::reciprocal":
            raise Miss(f"fp8 of the norm by an unknown scale, {describe(node)}")
        chain.append(node)
        node = node.args[0]
    true_scale = node
    while isinstance(node, fx.Node) and name_of(node) != "aten::amax":
        number = _number(node.args[1]) if len(node.args) > 1 else None
        if name_of(node) == "aten::div.Tensor" and number:
            divisor *= number
        elif name_of(node) == "aten::mul.Tensor" and number:
            divisor /= number
        elif set(bounds := _clamp(node)) == {"min"}:
            floor = max(floor, bounds["min"])
        else:
            raise Miss(f"fp8 of the norm by an unknown scale, {describe(node)}")
        chain.append(node)
        node = node.args[0]
    largest = node.args[0] if isinstance(node, fx.Node) else None
    if not (
        isinstance(largest, fx.Node)
        and name_of(largest) == "aten::abs"
        and largest.args[0] in found.norms
        and _last_dim_kept(node, largest)
        and math.isclose(divisor, FP8_LARGEST, rel_tol=1e-6)
    ):
        raise Miss(
            f"fp8 of the norm by a scale that is not amax / 448 of each token ({scale.name})"
        )
    if floor > 1e-6:
        raise Miss(f"fp8 of the norm with a floor of {floor} under the scale ({scale.name})")
    found.scales = true_scale
    return [*chain, node, largest]
