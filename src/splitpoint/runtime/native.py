"""Lines for a stitched function that call the runner in C++, where it knows the steps.

Consecutive steps that the runner knows become one program, and one line that calls it; other
lines stay. For most models that is one program for all, and a line that builds the result.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..graph.stitch import Body, Native, PieceSteps
from ..store.constants import decode
from ..torch_internals.operators import tensor_operator
from ..torch_internals.state import interposed
from .native_library import program_type

log = logging.getLogger("splitpoint")

_LOCAL = re.compile(r"\b[av]\d+\b")
"""How the lines of a body name its arguments and the values that they make."""


def native(body: Body) -> Native | None:
    """The same as a body's lines with the runner; None where it has nothing to do or cannot be
    built here."""
    operators = _operators(body)
    known = [step is not None and _known(step, body, operators) for step in body.steps]
    if not any(known) or (make := program_type()) is None:
        return None
    lines: list[str] = []
    programs: dict[str, Any] = {}
    bound: list[tuple[Any, tuple[str, ...]]] = []
    at = 0
    while at < len(body.lines):
        if not known[at] or body.steps[at][0] == "free":
            lines.append(body.lines[at])
            at += 1
            continue
        end = next((i for i in range(at, len(known)) if not known[i]), len(known))
        later = {name for line in body.lines[end:] for name in _LOCAL.findall(line)}
        part = _Part(body, operators, body.steps[at:end], later)
        arguments = part.program()
        try:
            program = make(*arguments)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            log.warning("a range runs in Python, because the runner refuses it: %s", error)
            return None
        name = f"n{len(programs)}"
        programs[name] = program
        bound.append((program, tuple(part.bound)))
        lines += part.lines(name)
        at = end
    return Native(tuple(lines), programs, tuple(bound), interposed)


def _operators(body: Body) -> dict[str, str]:
    """The operators that steps call, by the names that they have in the body."""
    called = {step[1] for step in body.steps if step is not None and step[0] == "op"}
    found = {name: operator_name(body.names[name]) for name in called}
    return {name: operator for name, operator in found.items() if operator is not None}


def _known(step: Sequence[Any], body: Body, operators: Mapping[str, str]) -> bool:
    kind, name = step[0], step[1]
    return kind == "free" or name in (body.pieces if kind == "piece" else operators)


def operator_name(target: Any) -> str | None:
    """The operator, "namespace::name.overload", behind a callable whose results are tensors;
    None when there is none."""
    if target is torch.nn.functional.scaled_dot_product_attention:
        return "aten::scaled_dot_product_attention.default"
    return tensor_operator(target)


class _Part:
    """Consecutive steps of a body, over numbered values: those that it makes from 0 up, the
    module's tensors and then the arguments from -1 down."""

    def __init__(
        self, body: Body, operators: Mapping[str, str], steps: Sequence[Any], later: set[str]
    ) -> None:
        self.body = body
        self.operators = operators
        self.steps = steps
        made = [name for step in steps for name in _made(step)]
        read = [name for step in steps for name in _read(step)]
        inside = set(made)
        outside = dict.fromkeys(name for name in read if name not in inside)
        self.bound = [name for name in outside if name.startswith("w")]
        self.inputs = [name for name in outside if not name.startswith("w")]
        self.ids = {name: index for index, name in enumerate(made)}
        for index, name in enumerate([*self.bound, *self.inputs]):
            self.ids[name] = -1 - index
        freed = dict.fromkeys(name for step in steps if step[0] == "free" for name in step[1])
        self.outputs = [name for name in made if name in later and name not in freed]
        self.freed = [name for name in freed if name not in inside]
        self.lengths = [name for name in body.parameters if not _LOCAL.fullmatch(name)]
        self.given: set[str] = set()
        """Values that the piece just added frees itself."""

    def lines(self, name: str) -> list[str]:
        left = f"({', '.join(self.outputs)},) = " if self.outputs else ""
        call = f"{left}{name}({', '.join([*self.lengths, *self.inputs])})"
        return [call, f"del {', '.join(self.freed)}"] if self.freed else [call]

    def program(self) -> tuple[list[Any], list[Any], int, int, list[int]]:
        """The arguments of a program."""
        names = dict.fromkeys(step[1] for step in self.steps if step[0] == "piece")
        numbers = {name: number for number, name in enumerate(names)}
        pieces = [_piece(self.body.pieces[name]) for name in names]
        steps: list[Any] = []
        for step, after in zip(self.steps, [*self.steps[1:], None], strict=True):
            if step[0] == "piece":
                last = after[1] if after is not None and after[0] == "free" else []
                taken = {name for name in last if name in step[2] and self.ids[name] >= 0}
                self.given = taken
                made = [numbers[step[1]], self.of(step[2]), self.of(step[3])]
                steps.append(["piece", *made, self.of(sorted(taken))])
            elif step[0] == "op":
                _, target, args, kwargs, output = step
                named = {key: self.value(each) for key, each in kwargs.items()}
                made = [[self.ids[output]], [self.value(each) for each in args], named]
                steps.append(["op", self.operators[target], *made])
            else:
                dead = [name for name in step[1] if self.ids.get(name, -1) >= 0]
                dead = [name for name in dead if name not in self.given]
                if dead:
                    steps.append(["free", self.of(dead)])
        return pieces, steps, len(self.inputs), len(self.bound), self.of(self.outputs)

    def of(self, names: Sequence[str]) -> list[int]:
        return [self.ids[name] for name in names]

    def value(self, value: Any) -> Any:
        if isinstance(value, dict):
            if "t" in value:
                return {"t": self.ids[value["t"]]}
            return self.body.names[value["k"]] if "k" in value else value
        return [self.value(each) for each in value] if isinstance(value, list) else value


def _made(step: Sequence[Any]) -> list[str]:
    if step[0] == "piece":
        return list(step[3])
    return [step[4]] if step[0] == "op" else []


def _read(step: Sequence[Any]) -> list[str]:
    if step[0] == "piece":
        return list(step[2])
    if step[0] == "op":
        return [*_tensors(step[2]), *_tensors(list(step[3].values()))]
    return []


def _tensors(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for each in value for name in _tensors(each)]
    return [value["t"]] if isinstance(value, dict) and "t" in value else []


def _piece(given: PieceSteps) -> dict[str, Any]:
    steps = []
    for step in given.data["steps"]:
        if step[0] in ("empty", "dtype"):
            steps.append([*step[:2], getattr(torch, step[2]), *step[3:]])
        elif step[0] == "op":
            named = {name: _constants(value) for name, value in step[4].items()}
            steps.append([*step[:3], _constants(step[3]), named])
        else:
            steps.append(step)
    return {**given.data, "steps": steps, "kernels": given.places()}


def _constants(value: Any) -> Any:
    if isinstance(value, dict):
        return decode(value["c"]) if "c" in value else value
    return [_constants(each) for each in value] if isinstance(value, list) else value
