"""The function around a piece's kernels as steps that the runner in C++ can take.

The text of a `Wrapper` is straight-line code of a few kinds: allocate, view, assert, call a
kernel or an operator, delete a name. Here each line becomes a list of names and numbers, which
is JSON: kept in a store, it need not be read from the text again. A piece with code that the
runner does not know stays a Python function.

Tensors are numbered *slots*; an integer is text in postfix over the size `s` ("64 s *"). A step is

- ["empty", slot, dtype, sizes, strides] and ["view", slot, of, sizes, strides, offset],
- ["sizes", slot, sizes, strides, what], ["dtype", slot, dtype, what] and ["align", slot, bytes,
  what]: assertions,
- ["kernel", number, arguments]: slots, text for integers, or [slot, offset] for memory from an
  element of a tensor on, which a view that only kernels read comes to,
- ["op", operator, slots of the results (-1: not wanted), arguments, keyword arguments]: in
  arguments {"t": slot}, {"e": integer}, {"c": encoded constant}, and plain JSON for itself,
- ["free", slots], after the last use, and ["bump", slots]: count up their versions.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from ..capture.postfix import FUNCTIONS, NotPostfix, postfix
from ..torch_internals.operators import returns_tensors
from .wrapper import Wrapper

Step = list[Any]
Json = Any

_EXTERN_OUT = ("mm", "addmm", "bmm", "baddbmm", "_int_mm")
"""Kernels of `extern_kernels` whose operator has an overload "out" for `out=`."""

MOST_KERNEL_ARGUMENTS = 64
"""As in runner.cpp."""


class NoStep(Exception):
    """Code that the runner has no step for; says what."""


def piece_steps(wrapper: Wrapper, takes: Sequence[str]) -> dict[str, Json]:
    """The steps of a piece.

    Args:
        wrapper: its code.
        takes: the text (`capture.postfix`) of each integer that it takes before its tensors.

    Returns:
        "parameters" (a slot for each tensor that it takes), "steps", "outputs" (slots) and
        "kernels" (their names in the order in which steps number them).

    Raises:
        NoStep: for code that the runner has no step for.
    """
    try:
        return _Reader(wrapper, takes).read()
    except NotPostfix as error:
        raise NoStep(str(error)) from error


class _Reader:
    def __init__(self, wrapper: Wrapper, takes: Sequence[str]) -> None:
        function = ast.parse(wrapper.source).body[0]
        assert isinstance(function, ast.FunctionDef)
        self.body = function.body
        self.kernels = list(wrapper.kernels)
        self.operators = wrapper.operators
        parameters = [each.arg for each in function.args.args]
        self.integers: dict[str, str] = {}
        for text in takes:
            self.integers[parameters.pop(0)] = text
        self.slots = {name: slot for slot, name in enumerate(parameters)}
        self.parameters = list(self.slots.values())
        self.count = len(parameters)
        self.owners = dict.fromkeys(self.parameters, 1)
        """How many names each slot has."""
        self.results: dict[str, dict[int, int]] = {}
        """By name of what an operator returned: the slots of its elements."""
        self.elements = _elements(self.body)
        self.only_memory = _only_memory(self.body, self.kernels)
        self.memory: dict[str, tuple[int, str]] = {}
        """By name of a view that only kernels read: the slot it is of, and its offset."""
        self.steps: list[Step] = []

    def read(self) -> dict[str, Json]:
        for statement in self.body[:-1]:
            self.statement(statement)
        last = self.body[-1]
        if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Tuple):
            raise NoStep("no tuple at the end")
        outputs = [self.tensor(each)[0] for each in last.value.elts]
        return {
            "parameters": self.parameters,
            "steps": self.steps,
            "outputs": outputs,
            "kernels": self.kernels,
        }

    # --- statements --------------------------------------------------------------------

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Delete):
            self.delete(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self.call(node.value)
        elif (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
        ):
            self.assign(node.targets[0].id, node.value)
        else:
            raise NoStep(f"the statement {ast.unparse(node)!r}")

    def delete(self, node: ast.Delete) -> None:
        dead: list[int] = []
        for target in node.targets:
            assert isinstance(target, ast.Name)
            if target.id in self.slots:
                self.drop(self.slots.pop(target.id), dead)
            elif target.id in self.results:
                for slot in self.results.pop(target.id).values():
                    self.drop(slot, dead)
            elif target.id in self.memory:
                self.drop(self.memory.pop(target.id)[0], dead)
            elif self.integers.pop(target.id, None) is None:
                raise NoStep(f"the name {target.id!r} deleted")
        self.free(dead)

    def assign(self, name: str, value: ast.expr) -> None:
        before = self.slots.pop(name, None)  # a name that is given anew frees what it named
        if isinstance(value, ast.Name) and value.id in self.slots:
            self.slots[name] = self.keep(self.slots[value.id])
        elif isinstance(value, ast.Subscript):
            self.slots[name] = self.keep(self.element(value))
        elif name in self.only_memory and isinstance(value, ast.Call):
            self.view_of_memory(name, value)
        elif isinstance(value, ast.Call) and self.function(value) not in FUNCTIONS:
            self.make(name, value)
        else:
            self.integers[name] = postfix(value, self.integers)
        if before is not None:
            dead: list[int] = []
            self.drop(before, dead)
            self.free(dead)

    def make(self, name: str, call: ast.Call) -> None:
        function = self.function(call)
        if function in ("empty_strided_cpu", "reinterpret_tensor"):
            self.slots[name] = self.tensor(call)[0]
        elif function in self.operators:
            wanted = self.elements.get(name)
            if wanted is None:
                self.slots[name] = self.new()
                self.operator(call, [self.slots[name]], by_element=False)
            else:
                made = {index: self.new() for index in sorted(wanted)}
                self.results[name] = made
                slots = [made.get(index, -1) for index in range(max(wanted, default=-1) + 1)]
                self.operator(call, slots, by_element=True)
        else:
            raise NoStep(f"a result of {function}")

    def view_of_memory(self, name: str, call: ast.Call) -> None:
        of = call.args[0]
        offset = postfix(call.args[3], self.integers) if len(call.args) > 3 else "0"
        if isinstance(of, ast.Name) and of.id in self.memory:
            slot, before = self.memory[of.id]
            offset = f"{before} {offset} +"
        else:
            slot = self.named(of)
        self.memory[name] = self.keep(slot), offset

    def call(self, call: ast.Call) -> None:
        function = self.function(call)
        if function in self.kernels:
            self.kernel(function, call)
        elif function in self.operators:
            self.operator(call, [], by_element=False)
        elif function == "assert_size_stride":
            tensor, sizes, strides, *what = call.args
            made = [self.integers_of(sizes), self.integers_of(strides), self.text(what)]
            self.steps.append(["sizes", self.named(tensor), *made])
        elif function == "assert_dtype":
            tensor, dtype, *what = call.args
            self.steps.append(["dtype", self.named(tensor), self.dtype(dtype), self.text(what)])
        elif function == "assert_alignment":
            tensor, amount, *what = call.args
            made = [postfix(amount, self.integers), self.text(what)]
            self.steps.append(["align", self.named(tensor), *made])
        elif function == "increment_version":
            (given,) = call.args
            if not isinstance(given, ast.Tuple):
                raise NoStep(f"the statement {ast.unparse(call)!r}")
            self.steps.append(["bump", [self.named(each) for each in given.elts]])
        else:
            raise NoStep(f"a call of {function}")

    # --- calls -------------------------------------------------------------------------

    def kernel(self, name: str, call: ast.Call) -> None:
        made: list[int | str | list[int | str]] = []
        temporary: list[int] = []
        for each in call.args:
            if isinstance(each, ast.Name) and each.id in self.memory:
                made.append([*self.memory[each.id]])
            elif self.is_tensor(each):
                slot, is_new = self.tensor(each)
                temporary += [slot] if is_new else []
                made.append(slot)
            else:
                made.append(postfix(each, self.integers))
        if call.keywords or len(made) > MOST_KERNEL_ARGUMENTS:
            raise NoStep(f"a kernel of {len(made)} arguments")
        self.steps.append(["kernel", self.kernels.index(name), made])
        self.free_temporary(temporary)

    def operator(self, call: ast.Call, results: list[int], by_element: bool) -> None:
        what = self.operators[self.function(call)]
        keywords = {each.arg: each.value for each in call.keywords if each.arg is not None}
        if len(keywords) < len(call.keywords):
            raise NoStep(f"arguments as in {ast.unparse(call)!r}")
        if what.startswith("extern_kernels."):
            kernel = what.partition(".")[2]
            if "out" in keywords and kernel not in _EXTERN_OUT:
                raise NoStep(f"{what} with out=")
            what = f"aten::{kernel}.{'out' if 'out' in keywords else 'default'}"
        elif "::" not in what:
            raise NoStep(f"a call of {what}")
        if results and not returns_tensors(what, len(results), by_element):
            raise NoStep(f"the results of {what}")
        temporary: list[int] = []
        args = [self.argument(each, temporary) for each in call.args]
        named = {name: self.argument(each, temporary) for name, each in keywords.items()}
        self.steps.append(["op", what, results, args, named])
        self.free_temporary(temporary)

    def argument(self, node: ast.expr, temporary: list[int]) -> Json:
        if self.is_tensor(node):
            slot, is_new = self.tensor(node)
            temporary += [slot] if is_new else []
            return {"t": slot}
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.argument(each, temporary) for each in node.elts]
        if isinstance(node, ast.Name) and node.id in self.operators:
            what = self.operators[node.id]
            if what.startswith("torch."):
                return {"c": ["torch", what.partition(".")[2]]}
        try:
            value = ast.literal_eval(node)
        except ValueError:
            return {"e": postfix(node, self.integers)}
        if value is not None and type(value) not in (bool, int, float, str):
            raise NoStep(f"the argument {ast.unparse(node)!r}")
        return value

    # --- values ------------------------------------------------------------------------

    def function(self, call: ast.Call) -> str:
        if not isinstance(call.func, ast.Name):
            raise NoStep(f"a call of {ast.unparse(call.func)}")
        return call.func.id

    def is_tensor(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.slots
        if isinstance(node, ast.Subscript):
            return isinstance(node.value, ast.Name) and node.value.id in self.results
        return isinstance(node, ast.Call) and self.function(node) == "reinterpret_tensor"

    def tensor(self, node: ast.expr) -> tuple[int, bool]:
        """The slot of a tensor, and whether it was made for this."""
        if isinstance(node, ast.Subscript):
            return self.element(node), False
        if not isinstance(node, ast.Call):
            return self.named(node), False
        function = self.function(node)
        if node.keywords:
            raise NoStep(f"arguments as in {ast.unparse(node)!r}")
        if function == "empty_strided_cpu":
            sizes, strides, dtype = node.args
            name = self.dtype(dtype)
            dims = [self.integers_of(sizes), self.integers_of(strides)]
            slot = self.new()
            self.steps.append(["empty", slot, name, *dims])
        elif function == "reinterpret_tensor":
            of, sizes, strides, *offset = node.args
            source, is_new = self.tensor(of)
            dims = [self.integers_of(sizes), self.integers_of(strides)]
            at = postfix(offset[0], self.integers) if offset else "0"
            slot = self.new()
            self.steps.append(["view", slot, source, *dims, at])
            self.free_temporary([source] if is_new else [])
        else:
            raise NoStep(f"a result of {function}")
        return slot, True

    def dtype(self, node: ast.expr) -> str:
        what = self.operators.get(node.id if isinstance(node, ast.Name) else "", "")
        if not what.startswith("torch."):
            raise NoStep(f"the dtype {ast.unparse(node)}")
        return what.partition(".")[2]

    def named(self, node: ast.expr) -> int:
        if not isinstance(node, ast.Name) or node.id not in self.slots:
            raise NoStep(f"{ast.unparse(node)} for a tensor")
        return self.slots[node.id]

    def element(self, node: ast.Subscript) -> int:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if name not in self.results or not isinstance(index, int):
            raise NoStep(f"the element {ast.unparse(node)}")
        return self.results[name][index]

    def integers_of(self, node: ast.expr) -> list[str]:
        if not isinstance(node, ast.Tuple):
            raise NoStep(f"{ast.unparse(node)} for a shape")
        return [postfix(each, self.integers) for each in node.elts]

    def text(self, nodes: Sequence[ast.expr]) -> str | None:
        if not nodes:
            return None
        (node,) = nodes
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            raise NoStep(f"the name {ast.unparse(node)}")
        return node.value

    # --- slots -------------------------------------------------------------------------

    def new(self) -> int:
        slot = self.count
        self.count += 1
        self.owners[slot] = 1
        return slot

    def keep(self, slot: int) -> int:
        self.owners[slot] += 1
        return slot

    def drop(self, slot: int, dead: list[int]) -> None:
        self.owners[slot] -= 1
        if not self.owners[slot]:
            dead.append(slot)

    def free(self, dead: list[int]) -> None:
        if dead:
            self.steps.append(["free", dead])

    def free_temporary(self, slots: list[int]) -> None:
        dead: list[int] = []
        for slot in slots:
            self.drop(slot, dead)
        self.free(dead)


def _elements(body: Sequence[ast.stmt]) -> dict[str, set[int]]:
    """By name: the elements read of it, for names that are only read so."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    found: dict[str, set[int]] = {}
    inside: dict[str, int] = {}
    for node in nodes:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            if not isinstance(index, int) or index < 0:
                raise NoStep(f"the element {ast.unparse(node)}")
            found.setdefault(node.value.id, set()).add(index)
            inside[node.value.id] = inside.get(node.value.id, 0) + 1
    reads: dict[str, int] = {}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            reads[node.id] = reads.get(node.id, 0) + 1
    for name in found:
        if reads[name] != inside[name]:
            raise NoStep(f"{name}, which is read as a whole and by element")
    return found


def _only_memory(body: Sequence[ast.stmt], kernels: Sequence[str]) -> set[str]:
    """Names of views of named tensors that kernels read and nothing else does, but for further
    views of that kind."""
    views = {
        statement.targets[0].id: statement.value
        for statement in body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Call)
        and ast.unparse(statement.value.func) == "reinterpret_tensor"
        and isinstance(statement.value.args[0], ast.Name)
        and not statement.value.keywords
    }
    assigned = [
        node.id
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    found = {name for name in views if assigned.count(name) == 1}
    while True:
        allowed = {id(views[name].args[0]) for name in found}
        for statement in body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Call) and ast.unparse(value.func) in kernels:
                allowed |= {id(each) for each in value.args}
        other = {
            node.id
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in allowed
        }
        if not found & other:
            return found
        found -= other
