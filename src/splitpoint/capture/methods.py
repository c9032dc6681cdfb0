"""The methods that a capture went through.

Dynamo goes through `type(module).forward` and has no guard on it: a method that is replaced in
its class, or given other code, would not be seen. Here the classes are asked themselves: those of
the module tree, and those of other objects where the name of a method's code says which they are.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..torch_internals.guard_expressions import find
from .code import functions_of
from .reads import ABSENT, Reads

Named = tuple[str, str, str]
""""of", the path of a module in a tree, and the name of an attribute of its class; or "in",
"module:class", and the name of an attribute of that."""

_FIELDS = ("__code__", "__defaults__", "__kwdefaults__", "__closure__")


def methods_in(owner: torch.nn.Module | None, traced: Iterable[types.CodeType]) -> list[Named]:
    """The methods whose code is among that traced, and the `forward` of each class of the tree;
    one module stands for all of its class."""
    codes = {id(code): code for code in traced}
    first: dict[type, str] = {}
    for path, module in owner.named_modules() if owner is not None else ():
        first.setdefault(type(module), path)
    found: list[Named] = []
    in_tree: set[int] = set()
    through: dict[int, bool] = {}
    for kind, path in first.items():
        names: dict[str, None] = {"forward": None}
        for base in kind.__mro__:
            for name, value in vars(base).items():
                if base is torch.nn.Module and name == "__init__":
                    continue  # torch replaces it itself, when torch.compile first runs
                if id(value) not in through:
                    own = {id(code) for code in _own_codes(value)}
                    through[id(value)] = not own.isdisjoint(codes)
                    in_tree |= own
                if through[id(value)]:
                    names[name] = None
        found += [("of", path, name) for name in names]
    others = [code for key, code in codes.items() if key not in in_tree]
    return [*found, *dict.fromkeys(_by_name(others))]


def _own_codes(value: Any) -> Iterator[types.CodeType]:
    """The code of a method, without that of decorators, which many functions share."""
    for function in functions_of(value):
        if not hasattr(function, "__wrapped__"):
            yield function.__code__


def _by_name(codes: Iterable[types.CodeType]) -> Iterator[Named]:
    """Methods by what their code is called and where it is written. Torch's own are left out, as
    a warm start would have to import them."""
    modules: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and not name.startswith("torch."):
            modules.setdefault(file, name)
    for code in codes:
        holder, _, name = code.co_qualname.rpartition(".")
        where = f"{modules.get(code.co_filename, '')}:{holder}"
        kind = find(where) if holder and code.co_filename in modules else None
        if isinstance(kind, type) and any(
            function.__code__ is code for function in functions_of(vars(kind).get(name))
        ):
            yield "in", where, name


@dataclass(frozen=True)
class _Method:
    kind: type
    name: str
    value: Any
    functions: tuple[tuple[types.FunctionType, tuple[Any, ...]], ...]
    """The Python functions behind it, with their code, defaults and closures."""

    def holds(self) -> bool:
        return _in_classes(self.kind, self.name) is self.value and _hold(self.functions)


class Methods:
    """Methods as they are when this is made.

    Args:
        owner: the tree that `names` is about.
        function: what was captured, if it is a function: its own code counts too.
    """

    def __init__(
        self, owner: torch.nn.Module | None, names: Sequence[Named], function: Callable[..., Any]
    ) -> None:
        self._own = _with_fields(() if isinstance(function, torch.nn.Module) else function)
        self._methods: list[_Method] = []
        for way, where, name in names:
            if way == "of":
                assert owner is not None
                kind = type(owner.get_submodule(where))
            else:
                kind = find(where)
            value = _in_classes(kind, name)
            self._methods.append(_Method(kind, name, value, _with_fields(value)))

    def holds(self) -> bool:
        """Whether they are the same still."""
        return _hold(self._own) and all(method.holds() for method in self._methods)

    def note(self, reads: Reads) -> None:
        """Note the places that decide it."""
        for function, _ in self._own:
            reads.function(function)
        for method in self._methods:
            reads.method(method.kind, method.name)

    def explain(self) -> str:
        """Which are not; "" where all are."""
        changed = [
            f"{method.kind.__module__}.{method.kind.__qualname__}.{method.name} was replaced"
            for method in self._methods
            if not method.holds()
        ]
        if not _hold(self._own):
            changed.insert(0, "the function has other code")
        return "; ".join(changed[:5])


def _in_classes(kind: type, name: str) -> Any:
    for base in kind.__mro__:
        if (found := vars(base).get(name, ABSENT)) is not ABSENT:
            return found
    return ABSENT


def _with_fields(value: Any) -> tuple[tuple[types.FunctionType, tuple[Any, ...]], ...]:
    return tuple((each, _fields(each)) for each in functions_of(value))


def _fields(function: types.FunctionType) -> tuple[Any, ...]:
    return tuple(getattr(function, name) for name in _FIELDS)


def _hold(functions: Iterable[tuple[types.FunctionType, tuple[Any, ...]]]) -> bool:
    return all(
        now is before
        for function, fields in functions
        for now, before in zip(_fields(function), fields, strict=True)
    )
