"""Write the function that every call of a compiled model enters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.signature import LENGTH
from ..torch_internals.state import set_grad_enabled
from .program import Program


def write_entry(
    program: Program, not_served: Callable[..., Any], other: Callable[..., Any]
) -> Callable[..., Any]:
    """Generate the function that every call enters: check, look up, run.

    It has the parameters of the callable, so that Python itself binds the arguments.

    Args:
        program: has the signatures, and what serves them.
        not_served: `not_served(dispatch, lengths, args, kwargs)` is called for sizes that have no
            lane.
        other: `other(*args, **kwargs)` is called where no signature can be seen to fit.
    """
    names: dict[str, Any] = {}
    known: list[_Known] = []
    for index, dispatch in enumerate(program.dispatches):
        conditions, tensors = dispatch.arguments.checks(names)
        table = dispatch.table if dispatch.dims.is_size_alone else dispatch.known
        names |= {f"_table{index}": table, f"_dispatch{index}": dispatch}
        lengths = [f"{LENGTH}{which}" for which in range(len(dispatch.dims.names))]
        takes = ", ".join([*lengths, *tensors])
        known.append(_Known(index, conditions, lengths, takes, dispatch.dims.is_size_alone))
        signature = dispatch.arguments.parameters
    parameters, forwarded, passed = _parameters(signature, names)
    lines = [f"def entry({parameters}):", "    _grad = _is_grad_enabled()"]
    lines += _tree(known, forwarded, f"return _other({passed})", "    ")
    names |= {
        "_is_grad_enabled": torch.is_grad_enabled,
        "_set_grad_enabled": set_grad_enabled,
        "_max_size": program.config.max_size,
        "_index_at": program.index_at,
        "_not_served": not_served,
        "_other": other,
        "_calls": program.calls,
        "_runners": program.runners,
    }
    source = "\n".join(lines)
    exec(compile(source, "<splitpoint entry>", "exec"), names)
    entry: Callable[..., Any] = names["entry"]
    entry.__doc__ = source
    return entry


@dataclass
class _Known:
    """A signature as the entry sees it."""

    index: int
    conditions: list[str]
    """Those that are not known to be true yet."""
    lengths: list[str]
    """Names of the lengths of its dynamic dimensions."""
    arguments: str
    """Source of what its lanes are called with."""
    is_size_alone: bool
    """Whether its one length is the size, for which there is a table."""


def _tree(known: list[_Known], forwarded: str, other: str, indent: str) -> list[str]:
    """Source that finds which of some signatures fits: what all ask is asked once, then what the
    first of them asks tells apart."""
    if len(known) == 1:
        (only,) = known
        asked = [f"{indent}if not ({' and '.join(only.conditions)}): {other}"]
        return [*(asked if only.conditions else ()), *_served(only, forwarded, indent)]
    shared: list[str] = []
    while all(each.conditions for each in known) and (
        len({each.conditions[0] for each in known}) == 1
    ):
        shared.append(known[0].conditions[0])
        for each in known:
            del each.conditions[0]
    lines = [f"{indent}if not ({' and '.join(shared)}): {other}"] if shared else []
    if not known[0].conditions:
        return [*lines, *_served(known[0], forwarded, indent)]
    first = known[0].conditions[0]
    alike = [each for each in known if each.conditions[:1] == [first]]
    rest = [each for each in known if each not in alike]
    for each in alike:
        del each.conditions[0]
    lines += [f"{indent}if {first}:", *_tree(alike, forwarded, other, indent + "    ")]
    return lines + _tree(rest, forwarded, other, indent)


def _served(known: _Known, forwarded: str, indent: str) -> list[str]:
    lengths = f"({', '.join(known.lengths)},)"
    dispatch = f"_dispatch{known.index}"
    if known.is_size_alone:
        (size,) = known.lengths
        found = [f"_index = _table{known.index}[{size}] if {size} <= _max_size else 0"]
    else:
        found = [
            f"_index = _table{known.index}.get({lengths})",
            f"if _index is None: _index = _index_at({dispatch}, {lengths})",
        ]
    lines = (
        *found,
        "if not _index:",
        f"    return _not_served({dispatch}, {lengths}, {forwarded})",
        "_calls[_index] += 1",
        "if not _grad:",
        f"    return _runners[_index]({known.arguments})",
        "_set_grad_enabled(False)",
        "try:",
        f"    return _runners[_index]({known.arguments})",
        "finally:",
        "    _set_grad_enabled(True)",
    )
    return [indent + line for line in lines]


def _parameters(signature: inspect.Signature, names: dict[str, Any]) -> tuple[str, str, str]:
    """Source of the parameter list, of `args, kwargs` that hold what the parameters are, and of the
    arguments of a call that passes it on.

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
    passed = [
        p if p.startswith("**") else f"{p.partition(': ')[2]}={p.partition(': ')[2]}"
        for p in keyword
    ]
    held = f"{args}, {{{', '.join(keyword)}}}"
    return ", ".join(parts), held, ", ".join([*positional, *passed])
