"""Digests of Python functions and classes by what they do, not by where they are."""

from __future__ import annotations

import functools
import hashlib
import marshal
import types
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

_CODE_FIELDS = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_exceptiontable"),
)
"""What of a code object decides what it does; not its file, its lines or its name."""

Code = types.CodeType


def short(text: str | bytes) -> str:
    """32 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:32]


_digests: dict[int, tuple[Code, str]] = {}
"""By id, with the code object, which is immutable. Its own hash reads all of it each time."""


def code_digest(code: Code) -> str:
    """A digest of a code object and those nested in it."""
    known = _digests.get(id(code))
    if known is None:
        fields = _fields(code) + tuple(map(_constant, code.co_consts))
        known = _digests[id(code)] = (code, short(marshal.dumps(fields, _MARSHAL_PLAIN)))
    return known[1]


_fields = attrgetter(*(name for name in _CODE_FIELDS if hasattr(Code, name)))

_MARSHAL_PLAIN = 2
"""The last version of marshal's format that does not tell objects from equal ones (interned
strings, values met before): its bytes follow from the values alone."""


def _constant(value: object) -> Any:
    """A constant as marshal can write it: itself, or a tuple that says what it is."""
    if type(value) in _PLAIN_CONSTANTS:
        return value
    if isinstance(value, Code):
        return "code", code_digest(value)
    if isinstance(value, frozenset):  # iterates in another order in each process
        return "frozenset", *sorted(marshal.dumps(_constant(v), _MARSHAL_PLAIN) for v in value)
    if isinstance(value, tuple):
        return "tuple", *map(_constant, value)
    return type(value).__name__, repr(value)


_PLAIN_CONSTANTS = frozenset((type(None), bool, int, float, complex, str, bytes))


def nested(code: Code) -> Iterator[Code]:
    """A code object and all those in it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, Code):
            yield from nested(value)


def functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The Python functions behind a function, method, property or wrapper, wrapped ones and
    those in closures included."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, types.FunctionType):
            yield each
            for cell in each.__closure__ or ():
                try:
                    held = cell.cell_contents
                except ValueError:
                    continue
                if isinstance(held, (types.FunctionType, types.MethodType)):
                    stack.append(held)
            stack.append(getattr(each, "__wrapped__", None))
        elif isinstance(each, types.MethodType):
            stack.append(each.__func__)
        elif isinstance(each, property):
            stack += [each.fget, each.fset]
        elif isinstance(each, (staticmethod, classmethod)):
            stack.append(each.__func__)
        elif isinstance(each, (functools.partial, functools.cached_property)):
            stack.append(each.func)


_HOLD_FUNCTIONS = (
    *(types.FunctionType, types.MethodType, property, staticmethod, classmethod),
    *(functools.partial, functools.cached_property),
)
"""What `functions_of` finds functions in."""


def function_digest(function: Any) -> str:
    """A digest of a function's code, of its plain defaults, and of the functions it wraps."""
    rows = []
    for each in functions_of(function):
        defaults = (*(each.__defaults__ or ()), *sorted((each.__kwdefaults__ or {}).items()))
        rows.append(f"{code_digest(each.__code__)} {[_default(value) for value in defaults]}")
    return short("\n".join(rows))


def _default(value: object) -> str:
    plain = (bool, int, float, str, bytes, type(None))
    if isinstance(value, tuple):
        return f"({','.join(map(_default, value))})"
    return repr(value) if isinstance(value, plain) else type(value).__qualname__


def class_codes(kind: type) -> Iterator[Code]:
    """The code of all methods of a class and its bases."""
    for base in kind.__mro__:
        for value in list(vars(base).values()):
            for function in functions_of(value):
                yield function.__code__


def class_digest(kind: type, known: dict[type, str] | None = None) -> str:
    """A digest of what a class and its bases define in Python: methods, plain constants.
    `known` remembers those of bases."""
    known = {} if known is None else known
    for base in kind.__mro__:
        if base not in known:
            known[base] = _own_digest(base)
    return short(" ".join(known[base] for base in kind.__mro__))


def _own_digest(base: type) -> str:
    rows = [f"class {base.__module__}.{base.__qualname__}"]
    for name, value in sorted(vars(base).items()):
        if name in ("__doc__", "__module__", "__firstlineno__", "__static_attributes__"):
            continue
        if type(value) in (bool, int, float, str, bytes, type(None)):
            rows.append(f"{name} = {value!r}")
        elif type(value) is types.FunctionType and not (
            value.__closure__ or hasattr(value, "__wrapped__")
        ):
            rows.append(f"{name} {[code_digest(value.__code__)]}")  # as below, in short
        elif isinstance(value, _HOLD_FUNCTIONS):
            found = [code_digest(function.__code__) for function in functions_of(value)]
            if found:
                rows.append(f"{name} {found}")
    return short("\n".join(rows))
