"""The function that Inductor writes around its kernels, taken out of the module it comes in.

Inductor's source is a module that imports Inductor, compiles the kernels and defines `call`,
which takes a list and asserts what it is given. What runs at a call is a few lines: allocate,
call a kernel, call an operator. Here those lines become a function of their own, with
parameters, that needs nothing but torch; `store/` keeps the same text.
"""

from __future__ import annotations

import ast
import builtins
import functools
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..torch_internals.cpp_kernels import Kernel
from ..torch_internals.generated_code import generated_code_names, is_plain_attribute, named_object

_BUILTINS = frozenset({"abs", "bool", "float", "int", "len", "max", "min", "range", "round"})
_UNCHECKED_OPS = ("torch.ops.splitpoint.", "torch.ops.splitpoint_onednn.")


class NotPlain(Exception):
    """The source does something that is not known here; says what."""


@dataclass(frozen=True)
class TritonSource:
    """A kernel in Triton, as Inductor wrote it."""

    name: str
    """Of the function."""
    source: str
    """A module that defines it."""
    device: str
    """Its type."""


@dataclass(frozen=True)
class Wrapper:
    """What Inductor's `call` does, as text."""

    source: str
    """Defines `call` with one parameter for each graph input; returns a tuple."""
    kernels: tuple[str, ...]
    """Names in it that are kernels, in C++ or in Triton."""
    operators: Mapping[str, str]
    """Names in it that are operators ("namespace::name.overload") or attributes of torch."""
    triton: Mapping[str, TritonSource] = field(default_factory=dict)
    """What those in Triton are, by name; not known of what comes from a store."""

    def bind(self, kernels: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
        """The function, over kernels by name.

        Raises:
            LookupError: when an operator is not registered here.
        """
        names = self._names(kernels)
        exec(_code(self.source), names)
        for name in self.kernels:
            if isinstance(kernel := kernels[name], Kernel):
                kernel.put(names, name)
        call: Callable[..., Any] = names["call"]
        return call

    def bind_when_called(self, kernels: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
        """The same, compiled by Python at the first call: for a function that hardly ever runs.

        Raises:
            LookupError: as `bind`.
        """
        names = self._names(kernels)

        def call(*args: Any) -> Any:
            if "call" not in names:
                exec(_code(self.source), names)
            return names["call"](*args)

        return call

    def _names(self, kernels: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
        names: dict[str, Any] = dict(generated_code_names())
        names |= {name: kernels[name] for name in self.kernels}
        return names | {name: named_object(what) for name, what in self.operators.items()}


@functools.lru_cache(maxsize=64)  # ranges often come to the same text
def _code(source: str) -> types.CodeType:
    return compile(source, "<splitpoint piece>", "exec")


def read_wrapper(
    module_source: str,
    trusted: Collection[int] = (),
    mutated: Collection[int] = (),
    to_align: Collection[int] = (),
) -> Wrapper:
    """Take `call` out of the source of one of Inductor's modules.

    Args:
        module_source: what Inductor wrote.
        trusted: graph inputs whose shape and strides are checked before; the others keep
            the assertions that Inductor wrote.
        mutated: graph inputs that it updates in place, whose version is to be counted up.
        to_align: graph inputs that its kernels assume to be aligned, which are copied where they
            are not.

    Raises:
        NotPlain: when it uses something that this does not know.
    """
    module = ast.parse(module_source)
    triton = _triton_kernels(module)
    kernels = [*_kernels(module), *triton]
    function = _call(module)
    parameters, body = _parameters(function)
    unchecked = {parameters[index] for index in trusted if index < len(parameters)}
    body = _only_what_counts(body, unchecked)
    if both := {*mutated} & {*to_align}:
        raise NotPlain(f"inputs that are updated, and copied to be aligned: {sorted(both)}")
    for index in sorted(to_align, reverse=True):
        name = parameters[index]
        body.insert(0, ast.parse(f"{name} = aligned({name})").body[0])
    if mutated:
        bumped = ", ".join(parameters[index] for index in sorted(mutated))
        body.insert(0, ast.parse(f"increment_version(({bumped},))").body[0])
    hoist = _Hoist()
    body = [hoist.visit(statement) for statement in body]
    known = {*kernels, *hoist.operators, *_BUILTINS, *generated_code_names()}
    used = _check_names(body, set(parameters), known)
    text = "\n".join(ast.unparse(statement) for statement in body)
    lines = "\n".join("    " + line for line in text.splitlines())
    return Wrapper(
        f"def call({', '.join(parameters)}):\n{lines}\n",
        tuple(name for name in kernels if name in used),
        dict(hoist.operators),
        {name: each for name, each in triton.items() if name in used},
    )


def _kernels(module: ast.Module) -> list[str]:
    """Names of the module's C++ kernels."""
    found = []
    for statement in module.body:
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and isinstance(statement.value, ast.Call)
            and ast.unparse(statement.value.func) == "async_compile.cpp_pybinding"
        ):
            found.append(statement.targets[0].id)
    return found


def _triton_kernels(module: ast.Module) -> dict[str, TritonSource]:
    """The module's kernels in Triton, by name."""
    found: dict[str, TritonSource] = {}
    for statement in module.body:
        if not (
            isinstance(statement, ast.Assign)
            and isinstance(target := statement.targets[0], ast.Name)
            and isinstance(call := statement.value, ast.Call)
            and ast.unparse(call.func) == "async_compile.triton"
        ):
            continue
        given = [*call.args, *(each.value for each in call.keywords if each.arg == "device_str")]
        texts = [each.value for each in given if isinstance(each, ast.Constant)]
        if len(texts) != 3 or len(given) != 3 or not all(isinstance(each, str) for each in texts):
            raise NotPlain(f"the kernel {target.id}, which is written otherwise")
        found[target.id] = TritonSource(*map(str, texts))
    return found


def _only_what_counts(body: list[ast.stmt], unchecked: Collection[str]) -> list[ast.stmt]:
    """Statements without assertions of what is known, and as they are kept."""
    found: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.With):
            found.append(_on_device(statement, unchecked))
        else:
            found += [one for one in _single(statement) if not _is_dropped(one, unchecked)]
    return found


def _on_device(block: ast.With, unchecked: Collection[str]) -> ast.stmt:
    """What is done with a CUDA device as the current one."""
    guard = block.items[0].context_expr
    device = guard.args[0] if isinstance(guard, ast.Call) and len(guard.args) == 1 else None
    if (
        len(block.items) != 1
        or block.items[0].optional_vars is not None
        or not (isinstance(device, ast.Constant) and isinstance(device.value, int))
        or ast.unparse(guard) != f"torch.cuda._DeviceGuard({device.value})"
    ):
        raise NotPlain(ast.unparse(block).partition("\n")[0])
    again = f"torch.cuda.set_device({device.value})"  # the guard has done that
    body = [each for each in block.body if ast.unparse(each) != again]
    entered = ast.parse(f"with {_ON_DEVICE}({device.value}): pass").body[0]
    assert isinstance(entered, ast.With)
    entered.body = _only_what_counts(body, unchecked) or [ast.Pass()]
    return entered


_ON_DEVICE = "cuda_device"
"""What generated code enters to have a device as the current one."""


def _call(module: ast.Module) -> ast.FunctionDef:
    """The function `call` of the module, or of the class `Runner` in it."""
    for statement in module.body:
        inside = statement.body if isinstance(statement, ast.ClassDef) else [statement]
        for each in inside:
            if isinstance(each, ast.FunctionDef) and each.name == "call":
                return each
    raise NotPlain("no function 'call'")


def _parameters(function: ast.FunctionDef) -> tuple[list[str], list[ast.stmt]]:
    """The names that `call` gives to the elements of its list, and what follows."""
    body = list(function.body)
    names: list[str] = []
    if isinstance(first := body[0], ast.Assign) and ast.unparse(first.value) == "args":
        target = first.targets[0]
        elements = target.elts if isinstance(target, (ast.Tuple, ast.List)) else None
        if elements is None or not all(isinstance(each, ast.Name) for each in elements):
            raise NotPlain(f"inputs taken apart by {ast.unparse(first)!r}")
        names = [each.id for each in elements if isinstance(each, ast.Name)]
        body.pop(0)
    if not body or ast.unparse(body[0]) != "args.clear()":
        raise NotPlain("inputs that are not taken from a list")
    body.pop(0)
    if not body:
        raise NotPlain("nothing after the inputs")
    return names, body


def _single(statement: ast.stmt) -> list[ast.stmt]:
    """The single assertions that one of several makes, as torch 2.14 and later write them; else
    the statement."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return [statement]
    if call.func.id == "assert_size_stride_grouped":
        *groups, what = call.args
        each = [group.elts for group in groups if isinstance(group, ast.Tuple)]
        if len(each) != 3 or call.keywords or len({len(group) for group in each}) != 1:
            raise NotPlain(f"the statement {ast.unparse(statement)!r}")
        return [_called("assert_size_stride", *one, what) for one in zip(*each, strict=True)]
    if call.func.id == "assert_tensor_metadata":
        if len(call.args) != 5 or call.keywords:
            raise NotPlain(f"the statement {ast.unparse(statement)!r}")
        tensor, sizes, strides, dtype, what = call.args
        return [
            _called("assert_dtype", tensor, dtype, what),
            _called("assert_size_stride", tensor, sizes, strides, what),
        ]
    return [statement]


def _called(name: str, *arguments: ast.expr) -> ast.stmt:
    return ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))


def _is_dropped(statement: ast.stmt, unchecked: Collection[str]) -> bool:
    """Whether a statement asserts what is known: the shape of a trusted input, or that of
    what one of this package's operators returned."""
    if not (
        isinstance(statement, ast.Expr)
        and isinstance(call := statement.value, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("assert_size_stride", "assert_alignment", "assert_dtype")
        and call.args
    ):
        return False
    what = call.args[-1]
    if not (isinstance(what, ast.Constant) and isinstance(what.value, str)):
        # Until torch 2.13 assertions about inputs do not say so.
        return isinstance(call.args[0], ast.Name) and call.args[0].id in unchecked
    if what.value == "input":
        return isinstance(call.args[0], ast.Name) and call.args[0].id in unchecked
    return what.value.startswith(_UNCHECKED_OPS)


class _Hoist(ast.NodeTransformer):
    """Replaces operators and dtypes, which are chains of attributes, by names."""

    def __init__(self) -> None:
        self.operators: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        text = ast.unparse(node)
        if text.startswith("aten."):
            text = f"torch.ops.{text}"
        if not text.startswith(("torch.", "extern_kernels.")):
            self.generic_visit(node)
            return node
        parts = text.split(".")
        if text.startswith("torch.ops."):
            if len(parts) != 5 or not all(part.isidentifier() for part in parts):
                raise NotPlain(f"the operator {text}")
            what = f"{parts[2]}::{parts[3]}.{parts[4]}"
        elif is_plain_attribute(text):
            what = text
        else:
            raise NotPlain(text)
        if what not in self._names:
            name = f"k{len(self._names)}_{parts[3] if '::' in what else parts[-1]}"
            self._names[what] = name
            self.operators[name] = what
        return ast.copy_location(ast.Name(self._names[what], ast.Load()), node)


def _check_names(body: list[ast.stmt], local: set[str], known: Collection[str]) -> set[str]:
    """The names that are read.

    Raises:
        NotPlain: for one that is neither local nor known.
    """
    nodes = [node for statement in body for node in ast.walk(statement)]
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.ClassDef)):
            raise NotPlain(ast.unparse(node))
        is_entered = isinstance(node, ast.With) and ast.unparse(
            node.items[0].context_expr
        ).startswith(f"{_ON_DEVICE}(")
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.With, ast.Try)) and not is_entered:
            raise NotPlain(f"a {type(node).__name__}")
    names = [node for node in nodes if isinstance(node, ast.Name)]
    local = local | {node.id for node in names if isinstance(node.ctx, ast.Store)}
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    for name in sorted(read - local):
        if name not in known:
            raise NotPlain(f"the name {name!r}")
        assert name not in _BUILTINS or hasattr(builtins, name)
    return read
