"""Dynamo's guards as Python expressions that can be evaluated without Dynamo.

A guard says that something which tracing read is as it was. Each is
written here as an expression whose value has to stay what it is: `type(m.config)` for the
guard on a type, `len(x)` for one on a length.
"""

from __future__ import annotations

import ast
import importlib
import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class NotPortable(Exception):
    """A guard that means something in this process only; says what."""


@dataclass(frozen=True)
class GuardScope:
    """What the names of guards are relative to."""

    owner: torch.nn.Module | None
    owner_name: str | None
    """The parameter that is the module."""
    arguments: frozenset[str]
    """The other parameters: what a call passes."""
    closure: Mapping[str, types.CellType]
    globals: dict[str, Any]
    rooted: dict[str, str | None] = field(default_factory=dict, compare=False, repr=False)
    """What is known of names already: guards share them, and are gone through several times."""


_OF_THE_CALL = frozenset(
    {
        *("SHAPE_ENV", "GRAD_MODE", "DETERMINISTIC_ALGORITHMS", "GLOBAL_STATE"),
        *("TORCH_FUNCTION_STATE", "DEFAULT_DEVICE", "AUTOGRAD_SAVED_TENSORS_HOOKS"),
        *("DUAL_LEVEL", "FUNCTORCH_STACK_MATCH", "FSDP_TRAINING_STATE"),
    }
)
"""Guards on the state of torch, which is compared as a whole."""

_VALUE = frozenset(
    {
        *("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "ID_MATCH"),
        *("FUNCTION_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH", "CLASS_MATCH", "MODULE_MATCH"),
    }
)


def expressions(
    entries: Sequence[Any], scope: GuardScope, bound: Collection[int]
) -> dict[str, None]:
    """The expressions of some guards, over `self` (the module), `G` (its globals), `F` (the
    closure), `M` (modules by name), `C` (objects by "module:name") and `B` (builtins).

    Tensors whose ids are in `bound` are left out: they are compared elsewhere.

    Raises:
        NotPortable: for a guard that cannot be written so.
    """
    found: dict[str, None] = {}
    for entry in entries:
        if entry.guard_type in _OF_THE_CALL:
            continue
        if entry.guard_type == "TENSOR_MATCH" and id(entry.value) in bound:
            continue
        names = [entry.name]
        keywords = getattr(entry.orig_guard.create_fn, "keywords", {})
        if entry.guard_type == "HASATTR" and "attr" not in keywords:
            # Torch 2.11 names the attribute, later ones the object.
            source = entry.orig_guard.originating_source
            names, keywords = [source.base.name], {"attr": source.member}
        if "source_b" in keywords:
            names.append(keywords["source_b"].name)
        codes = [_rooted(name, scope) for name in names]
        if None in codes or "" in codes:
            continue
        code = _expression(entry.guard_type, [str(code) for code in codes], keywords, entry)
        found[code] = None
    return found


def _expression(kind: str, codes: list[str], keywords: Mapping[str, Any], entry: Any) -> str:
    code = codes[0]
    if kind in _VALUE:
        return code
    if kind == "TYPE_MATCH":
        return f"type({code})"
    if kind == "SEQUENCE_LENGTH":
        return f"(type({code}), len({code}))"
    if kind in ("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"):
        return f"tuple({code})"
    if kind == "EMPTY_NN_MODULE_HOOKS_DICT":
        return f"len({code})"
    if kind == "NOT_NONE_MATCH":
        return f"{code} is not None"
    if kind == "DUPLICATE_INPUT":
        return f"{code} is {codes[1]}"
    if kind in ("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"):
        return f"{_literal(keywords.get('key'))} in {code}"
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return f"{_literal(keywords.get('attr'))} in vars({code})"
    if kind == "HASATTR":
        return f"hasattr({code}, {_literal(keywords.get('attr'))})"
    raise NotPortable(f"a guard {kind} on {entry.name or 'the state of torch'}")


def _literal(value: object) -> str:
    if isinstance(value, (str, int)):
        return repr(value)
    raise NotPortable(f"a guard on a key that is {value!r}")


def rooted(name: str, scope: GuardScope) -> str | None:
    """A guard's name over the roots of `expressions`; None when it cannot be written so."""
    try:
        return _rooted(name, scope) or None
    except NotPortable:
        return None


def _rooted(name: str, scope: GuardScope) -> str | None:
    """A guard's name over the roots of `expressions`; None when it is about an argument."""
    if not name:
        return ""
    if name not in scope.rooted:
        code = _parsed(name, scope)
        if "G[" in name:  # it depends on what the globals are now
            return code
        scope.rooted[name] = code
    return scope.rooted[name]


_LAST_STEP = re.compile(
    r"(.*(?:[\])]|\b[a-zA-Z_]\w*))(\.[a-zA-Z_]\w*|\['[\w.-]*'\]|\[(?:0|[1-9]\d*)\])", re.ASCII
)
"""A name that ends in a step from something else, which `ast.unparse` writes the same way."""


def _parsed(name: str, scope: GuardScope) -> str | None:
    # Names are long paths, of which most guards share all but the last step.
    if (match := _LAST_STEP.fullmatch(name)) and match[1] not in ("L", "G"):
        code = _rooted(match[1], scope)
        return None if code is None else code + match[2]
    return _parsed_whole(name, scope)


def _parsed_whole(name: str, scope: GuardScope) -> str | None:
    """What `_parsed` says, at once."""
    try:
        tree = ast.parse(name, mode="eval")
    except SyntaxError as error:
        raise NotPortable(f"a guard on {name}") from error
    roots = _Roots(scope)
    code = ast.unparse(roots.visit(tree))
    return None if roots.is_argument else code


class _Roots(ast.NodeTransformer):
    def __init__(self, scope: GuardScope) -> None:
        self.scope = scope
        self.is_argument = False

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if (
            isinstance(node.value, ast.Name)
            and node.value.id in ("L", "G")
            and isinstance(node.slice, ast.Constant)
        ):
            name = str(node.slice.value)
            return self.local(name) if node.value.id == "L" else self.global_(name)
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        scope = self.scope
        if node.id in scope.arguments or node.id == scope.owner_name or node.id in scope.closure:
            return self.local(node.id)
        if node.id in ("dict", "type", "list", "tuple", "object", "set", "next", "iter", "len"):
            return node
        raise NotPortable(f"a guard on {node.id}")

    def local(self, name: str) -> ast.AST:
        if name == self.scope.owner_name:
            return ast.Name("self", ast.Load())
        if name in self.scope.closure:
            return _item("F", name)
        self.is_argument = True
        return ast.Name(name, ast.Load())

    def global_(self, name: str) -> ast.AST:
        if re.match(r"__builtins_dict__", name):
            return ast.Name("B", ast.Load())
        value = self.scope.globals.get(name, self)
        if value is self:
            raise NotPortable(f"a guard on the global {name}")
        if not re.match(r"__import_|_\d+_c\d+$", name):
            return _item("G", name)
        # Dynamo's own names for what it needs to get at.
        if isinstance(value, types.ModuleType):
            return _item("M", value.__name__)
        where = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
        if find(where) is value:
            return _item("C", where)
        raise NotPortable(f"a guard on a {type(value).__name__} that has no name")


def _item(root: str, name: str) -> ast.AST:
    return ast.Subscript(ast.Name(root, ast.Load()), ast.Constant(name), ast.Load())


def find(where: str) -> Any:
    """The object "module:qualified.name", or None."""
    module, _, name = where.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return found
