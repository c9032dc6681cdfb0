"""Integers over dynamic dimensions as text in postfix, which C++ reads without a parser."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "/",
    ast.Mod: "%",
}
_FUNCTIONS = {"min": "<", "max": ">"}

FUNCTIONS = frozenset({*_FUNCTIONS, "int"})
"""Calls that `postfix` knows."""


class NotPostfix(Exception):
    """An expression that has no such text; says what."""


def postfix(node: ast.expr, names: Mapping[str, str]) -> str:
    """An integer expression: numbers, "s" for the size (or the first of several dimensions, "s1"
    for the next), and + - * / % < >, where / rounds down
    and < and > are the lesser and the greater: "64 s *".

    Args:
        node: of Python code.
        names: the text of integers by name.

    Raises:
        NotPostfix: for an operation that there is no sign for.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return str(node.value)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return f"0 {postfix(node.operand, names)} -"
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = postfix(node.left, names), postfix(node.right, names)
        return f"{left} {right} {_OPERATORS[type(node.op)]}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if (sign := _FUNCTIONS.get(node.func.id)) and len(node.args) == 2:
            left, right = (postfix(each, names) for each in node.args)
            return f"{left} {right} {sign}"
        if node.func.id == "int" and len(node.args) == 1:
            return postfix(node.args[0], names)
    raise NotPostfix(f"the integer {ast.unparse(node)!r}")


def lengths_postfix(names: Sequence[str]) -> dict[str, str]:
    """The text of the lengths of dynamic dimensions by name."""
    return {name: f"s{index or ''}" for index, name in enumerate(names)}


def size_postfix(code: str, names: Sequence[str]) -> str:
    """The text of Python code over the names of dynamic dimensions.

    Raises:
        NotPostfix: as `postfix`.
    """
    return postfix(ast.parse(code, mode="eval").body, lengths_postfix(names))
