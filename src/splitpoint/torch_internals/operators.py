"""Operators as FX graphs and stores name them: from an operator to its name and back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .probe import fits, require

require("operators")


def op_name(target: object) -> str:
    """The name of what an FX node calls: "namespace::name" for a torch operator, with
    ".overload" unless it is the default one; else a Python qualified name."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.name())  # type: ignore[no-untyped-call]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())  # type: ignore[no-untyped-call]
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target))
    if inspect.isbuiltin(target) and isinstance(owner := getattr(target, "__self__", None), type):
        name = f"{owner.__qualname__}.{name}"
    return f"{module}.{name}"


def operator_aliases(name: str) -> set[str]:
    """The names under which Dynamo's graph may hold the operator "namespace::name".

    Raises:
        LookupError: when no such operator is registered.
    """
    if "::" not in name:
        found = getattr(torch.ops.higher_order, name, None)
        if not isinstance(found, torch._ops.HigherOrderOperator):
            raise LookupError(name)
        return {name}
    namespace, _, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, namespace), packet_name)
        wanted = [overload] if overload else packet.overloads()
        names = {getattr(packet, each).name() for each in wanted}
    except (AttributeError, RuntimeError) as error:
        raise LookupError(name) from error
    names |= (
        {name.removesuffix(".default"), f"{namespace}::{packet_name}"} if not overload else {name}
    )
    if namespace == "aten":
        # torch.nn.functional holds these as built-in functions of torch._C._nn and torch.
        for owner in (torch._C._nn, torch._C._VariableFunctions, torch):
            if (function := getattr(owner, packet_name, None)) is not None:
                names.add(op_name(function))
        if packet_name == "scaled_dot_product_attention":
            names.add(op_name(torch.nn.functional.scaled_dot_product_attention))
    return names


def is_higher_order(target: object) -> bool:
    """Whether an FX target is a higher-order operator, such as flex_attention."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def operator_schema(target: object) -> str | None:
    """The schemas of an operator, or of all overloads of one; None for other targets."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema)
    if isinstance(target, torch._ops.OpOverloadPacket):
        names = target.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(target, name) for name in names]
        return "; ".join(str(overload._schema) for overload in overloads)
    return None


def is_builtin_target(target: Any) -> bool:
    """Whether an FX target is code of Python's or torch's own, or a higher-order operator."""
    if is_higher_order(target):
        return True
    module = str(getattr(target, "__module__", None) or "")
    name = str(getattr(target, "__qualname__", None) or getattr(target, "__name__", "<"))
    own = module.split(".")[0] in ("builtins", "_operator", "operator", "math", "torch", "")
    return own and "<" not in name


def is_random(target: Any) -> bool:
    """Whether an operator gives something else at each call."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


PAIRED_STATE = {
    op_name(torch.amp.autocast_mode._enter_autocast): 1,
    op_name(torch.amp.autocast_mode._exit_autocast): -1,
    op_name(torch.autograd.grad_mode._enter_inference_mode): 1,
    op_name(torch.autograd.grad_mode._exit_inference_mode): -1,
}
"""Calls in a Dynamo graph that open (1) or close (-1) a state around others."""


GRAD_STATE = frozenset({op_name(torch._C._set_grad_enabled)} if fits("grad mode") else ())
"""Calls that set grad mode: without effect here, where nothing ever records gradients."""


OPERATOR_TYPES = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
"""An operator, and all overloads of one."""


def find_operator(name: str) -> Any:
    """The operator "namespace::name.overload".

    Raises:
        LookupError: when it is not registered.
    """
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    return operator_at([namespace, base, overload])


def operator_at(path: Sequence[str]) -> Any:
    """The operator at [namespace, name, overload], or all overloads at [namespace, name].

    Raises:
        LookupError: when it is not registered.
    """
    found: Any = torch.ops
    try:
        for part in path:
            found = getattr(found, part)
    except (AttributeError, RuntimeError) as error:
        name = f"{path[0]}::{'.'.join(path[1:])}"
        raise LookupError(f"no operator {name} is registered") from error
    return found


def operator_path(operator: Any) -> list[str]:
    """What `operator_at` takes."""
    if isinstance(operator, torch._ops.OpOverload):
        packet = operator._overloadpacket
        return [*packet._qualified_op_name.split("::"), operator._overloadname]
    return list(operator._qualified_op_name.split("::"))


def returns_tensors(name: str, wanted: int, by_element: bool) -> bool:
    """Whether an operator returns tensors: a list or at least `wanted` where they are taken
    `by_element`, else one."""
    try:
        returns = find_operator(name)._schema.returns
    except LookupError:
        return False
    kinds = [str(each.type) for each in returns]
    if not by_element:
        return kinds == ["Tensor"]
    return kinds == ["List[Tensor]"] or (len(kinds) >= max(2, wanted) and set(kinds) == {"Tensor"})


def tensor_operator(target: Any) -> str | None:
    """The name "namespace::name.overload" of an operator that returns one tensor; None for what
    is none, or has overloads that its arguments choose from."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()  # type: ignore[no-untyped-call]
        if len(overloads) != 1:
            return None
        target = getattr(target, overloads[0])
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if [str(each.type) for each in target._schema.returns] != ["Tensor"]:
        return None
    return f"{target._overloadpacket._qualified_op_name}.{target._overloadname}"
