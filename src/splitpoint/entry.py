"""Write the function that every call of a compiled model enters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import _torch
from .graph.signature import Signature
from .program import Program


def write_entry(
    signature: Signature, program: Program, not_served: Callable[..., Any]
) -> Callable[..., Any]:
    """Generate the function that every call enters: check, look up, run.

    It has the parameters of the callable, so that Python itself binds the arguments.
    `not_served(size, args, kwargs)` is called for sizes that have no lane.
    """
    conditions, names, tensors = signature.checks()
    parameters, forwarded = _parameters(signature.parameters, names)
    lines = [
        f"def entry({parameters}):",
        "    grad = is_grad_enabled()",
        f"    if not ({' and '.join(conditions)}):",
        f"        size = explain({forwarded})",
        "    index = table[size] if size <= max_size else 0",
        "    if not index:",
        f"        return not_served(size, {forwarded})",
        "    calls[index] += 1",
        "    if not grad:",
        f"        return runners[index]({', '.join(['size', *tensors])})",
        "    set_grad_enabled(False)",
        "    try:",
        f"        return runners[index]({', '.join(['size', *tensors])})",
        "    finally:",
        "        set_grad_enabled(True)",
    ]
    names |= {
        "is_grad_enabled": torch.is_grad_enabled,
        "set_grad_enabled": _torch.set_grad_enabled,
        "explain": lambda args, kwargs: signature.explain(signature.bind(args, kwargs)),
        "table": program.table,
        "max_size": program.config.max_size,
        "not_served": not_served,
        "calls": program.calls,
        "runners": program.runners,
    }
    source = "\n".join(lines)
    exec(compile(source, "<splitpoint entry>", "exec"), names)
    entry: Callable[..., Any] = names["entry"]
    entry.__doc__ = source
    return entry


def _parameters(signature: inspect.Signature, names: dict[str, Any]) -> tuple[str, str]:
    """Source of the parameter list, and of `args, kwargs` that pass the parameters on.

    Defaults become names in `names`; annotations are left out.
    """
    parts: list[str] = []
    positional: list[str] = []
    keyword: list[str] = []
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        text = name
        if parameter.default is not parameter.empty:
            names[f"_d{index}"] = parameter.default
            text = f"{name}=_d{index}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts.append(f"*{name}")
            positional.append(f"*{name}")
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{name}")
            keyword.append(f"**{name}")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.KEYWORD_ONLY not in kinds[:index] and (
                parameter.VAR_POSITIONAL not in kinds[:index]
            ):
                parts.append("*")
            keyword.append(f"{name!r}: {name}")
        else:
            positional.append(name)
        parts.append(text)
        if parameter.kind is parameter.POSITIONAL_ONLY and (
            kinds[index + 1 : index + 2] != [parameter.POSITIONAL_ONLY]
        ):
            parts.append("/")
    args = f"({''.join(p + ', ' for p in positional)})"
    return ", ".join(parts), f"{args}, {{{', '.join(keyword)}}}"
