"""Every private torch name the project touches, and nothing else.

Checked on torch 2.13.0. Modules of Dynamo and Inductor are imported inside the functions
that need them, so that importing this package costs no more than importing torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import fx

from ._torch_build import whole_files
from ._torch_checks import Checks
from ._torch_codegen import dtype_rules_made_once
from ._torch_cpp import Kernel, waiting_kernels
from ._torch_guards import GuardScope
from ._torch_isa import quick_isa_checks
from ._torch_questions import Questions
from ._torch_tracing import no_source_lines, traces_alone

if TYPE_CHECKING:
    import sympy

tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten
tree_flatten_with_path = pytree.tree_flatten_with_path
keystr = pytree.keystr
TreeSpec = pytree.TreeSpec

set_grad_enabled = torch._C._set_grad_enabled
"""Sets grad mode and returns nothing; 50 ns, where `torch.no_grad()` takes over 500."""


@functools.cache
def size_symbol() -> sympy.Symbol:
    """The one symbol that all of a graph's size symbols are written as."""
    import sympy

    return sympy.Symbol("size", integer=True, nonnegative=True)


# --- operators -------------------------------------------------------------------------


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


PAIRED_STATE = {
    op_name(torch.amp.autocast_mode._enter_autocast): 1,
    op_name(torch.amp.autocast_mode._exit_autocast): -1,
    op_name(torch.autograd.grad_mode._enter_inference_mode): 1,
    op_name(torch.autograd.grad_mode._exit_inference_mode): -1,
}
"""Calls in a Dynamo graph that open (1) or close (-1) a state around others."""

GRAD_STATE = frozenset({op_name(torch._C._set_grad_enabled)})
"""Calls that set grad mode: without effect here, where nothing ever records gradients."""


# --- symbolic sizes --------------------------------------------------------------------


def statically_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every size of the range, without adding a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def statically_at_most(size: int | torch.SymInt, bound: int) -> bool:
    """Whether a size is at most `bound` for every size of the range, without a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size <= bound))


def statically_divisible(size: int | torch.SymInt, by: int) -> bool:
    """Whether `by` divides a size for every size of the range, without a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size % by == 0))


def share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether two of some (fake) tensors are views of the same memory."""
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    return len(set(storages)) < len(storages)


def expression(value: object) -> sympy.Basic | None:
    """The expression of a symbolic int, float or bool; the number of a plain one; or None."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    if isinstance(value, (bool, int)):
        import sympy

        return sympy.sympify(value)
    return None


Symbols = Mapping["sympy.Symbol", "sympy.Expr"]
"""What each symbol of a captured graph is in terms of `size_symbol()`: the size itself or, for the
stride of an argument that is not contiguous, a constant or a multiple of the size."""


def in_terms_of_size(expr: sympy.Basic, symbols: Symbols) -> sympy.Basic:
    """The expression over the one symbol `size_symbol()`."""
    return expr.xreplace(dict(symbols))


def symbols_in(values: Sequence[Any]) -> frozenset[sympy.Symbol]:
    """The symbols that occur in tensors' shapes and strides and in symbolic integers."""
    found: set[sympy.Symbol] = set()
    for value in values:
        parts = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        for part in parts:
            if isinstance(part, torch.SymInt):
                found |= part.node.expr.free_symbols
    return frozenset(found)


def size_finder(values: Sequence[Any], symbols: Symbols) -> Callable[[Sequence[Any]], int] | None:
    """A function that reads the size off a graph's inputs; None when it has no symbol.

    Raises:
        LookupError: when no input is the size itself or has it as a dimension.
    """
    if not symbols:
        return None
    for index, value in enumerate(values):
        if isinstance(value, torch.SymInt) and value.node.expr in symbols:
            return lambda args: int(args[index])
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            for dim, length in enumerate(value.shape):
                if isinstance(length, torch.SymInt) and length.node.expr in symbols:
                    return lambda args: int(args[index].shape[dim])
    raise LookupError(str(symbols))


def python_code(expr: sympy.Basic) -> str:
    """Python source that computes an expression over the variable `size` (and `math`)."""
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expr))


def as_nodes(expr: sympy.Basic, size: fx.Node) -> Any:
    """Insert nodes into `size`'s graph that compute an expression from it."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    tracer = fx.proxy.GraphAppendingTracer(size.graph)
    value = sympy_interp(PythonReferenceAnalysis, {size_symbol(): fx.Proxy(size, tracer)}, expr)
    return value.node if isinstance(value, fx.Proxy) else value


@dataclass(frozen=True)
class Assumed:
    """One fact about the size that a compile step relied on, as read from a ShapeEnv."""

    expr: sympy.Basic
    origin: str


def assumptions(env: Any, symbols: Symbols, bounds: tuple[int, int] | None = None) -> list[Assumed]:
    """What a ShapeEnv came to assume of its size symbols, over the one symbol `size_symbol()`.

    Reads guards, replacements, deferred run-time asserts and narrowed intervals. `bounds`
    is the interval the symbols started with, None for [0, infinity). Facts about other
    (unbacked) symbols stay in the graph as run-time asserts and are left out.
    """
    import sympy

    found: list[Assumed] = []

    def add(expr: sympy.Basic, origin: str) -> None:
        if isinstance(expr, bool):
            expr = sympy.sympify(expr)
        if expr.free_symbols and expr.free_symbols <= symbols.keys():
            expr = in_terms_of_size(expr, symbols)
            if expr is not sympy.true and all(expr != a.expr for a in found):
                found.append(Assumed(expr, origin))

    for guard in env.guards:
        add(guard.expr, _origin(str(guard.sloc)))
    for asserts in env.deferred_runtime_asserts.values():
        for entry in asserts:
            add(entry.expr, str(entry.msg))
    for symbol, replacement in env.replacements.items():
        if symbol in symbols:
            add(sympy.Eq(symbol, replacement), f"{symbol} was replaced by {replacement}")
    for symbol in [symbol for symbol, meaning in symbols.items() if meaning == size_symbol()]:
        interval = env.var_to_range.get(symbol)
        if interval is None:
            continue
        lower, upper = bounds or (0, None)
        if interval.lower > lower:
            add(symbol >= interval.lower, "the compiler narrowed the interval of the size")
        if isinstance(interval.upper, sympy.Integer) and (upper is None or interval.upper < upper):
            add(symbol <= interval.upper, "the compiler narrowed the interval of the size")
    return found


def _origin(location: str) -> str:
    """`path:line in function` of `source line  # path:line in function (torch's own line)`."""
    user = re.search(r"# (\S+:\d+ in \S+)", location)
    return user[1] if user else location.strip().strip("()")


# --- capture ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DynamoCapture:
    """What one run of Dynamo over a callable gives."""

    graph_module: fx.GraphModule
    placeholders: tuple[Any, ...]
    """The value (fake tensor, SymInt, ...) of each graph input."""
    inputs: Callable[[], tuple[Any, ...]]
    """Fetches the graph inputs anew from the module, closures and example arguments."""
    result: Callable[[Sequence[Any]], Any]
    """What the callable returns for given graph outputs."""
    checks: Checks
    """What was guarded."""
    traced_code: tuple[Any, ...]
    """The code objects that tracing went through."""
    dimensions: frozenset[sympy.Symbol]
    """The symbols that came into being as a dimension of an argument."""
    assumptions: Callable[[Symbols], list[Assumed]]
    """What tracing took for granted, given what the symbols mean."""
    side_effects: tuple[str, ...]
    """Sources of the Python objects the callable changes, as Dynamo names them."""


class DynamoFailure(Exception):
    """Dynamo could not capture the callable; the cause says why."""


class _Fetched(Exception):
    pass


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a logger: of an error that is raised as well, or of what is known."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def compile_lock() -> contextlib.AbstractContextManager[bool]:
    """The lock that Dynamo holds while it compiles: its settings, and Inductor's, are those of
    the whole process."""
    from torch._dynamo.convert_frame import compile_lock as lock

    return lock


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo treat a dimension as symbolic, without an error where it cannot."""
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, dim)


def dynamo_capture(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> DynamoCapture:
    """Capture a callable as one graph. Runs nothing of it and changes nothing of it.

    Size 1 and size 0 are not special, equal dimensions do not share a symbol, floats are
    constants, and nothing that was learnt from an earlier capture is used.

    Raises:
        DynamoFailure: when there is no full graph.
    """
    import torch._dynamo.config as dynamo_config
    import torch.fx.experimental._config as fx_config
    from torch._dynamo.convert_frame import (
        _get_frame,
        fullgraph_capture,
        get_traced_fn,
    )
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.source import TensorProperty, TensorPropertySource
    from torch._dynamo.utils import get_metrics_context
    from torch._guards import TracingContext

    with (
        compile_lock(),
        torch.inference_mode(False),
        torch.no_grad(),
        fx_config.patch(backed_size_oblivious=True, use_duck_shape=False),  # type: ignore[attr-defined]
        dynamo_config.patch(
            specialize_float=True,
            assume_static_by_default=True,
            automatic_dynamic_shapes=False,
            replay_side_effects=False,
            side_effect_replay_policy="warn",
        ),
        get_metrics_context(),
        no_source_lines(),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            with _quiet("torch._subclasses.fake_tensor"):
                out = fullgraph_capture(function, args, dict(kwargs))
        except TorchDynamoException as error:
            raise DynamoFailure(str(error).split("\n\nfrom user code")[0]) from error
    effects: tuple[str, ...] = ()
    for warning in caught:
        if found := re.search(r"we found certain side effects.*?(\[.*\])$", str(warning.message)):
            effects = tuple(ast.literal_eval(found[1]))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if out.backend_input is None:
        raise DynamoFailure("the function computes nothing with tensors")

    traced, owner = get_traced_fn(function)
    variadic = {
        f"L[{name!r}]"
        for name, parameter in inspect.signature(traced, follow_wrapped=False).parameters.items()
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    # A call's own **kwargs dict dies with the call.
    effects = tuple(effect for effect in effects if effect not in variadic)

    backend_input, captured = out.backend_input, out.graph_capture_output
    graph_module = backend_input.graph_module
    env = backend_input.fake_mode.shape_env
    placeholders = tuple(
        node.meta["example_value"] for node in graph_module.graph.find_nodes(op="placeholder")
    )

    # Guards are evaluated against the example arguments: what they hold of the module and of
    # globals is live, what they hold of arguments is constant.
    context = TracingContext(backend_input.fake_mode)
    context.tensor_to_context = backend_input.tensor_to_context
    frame_locals = _get_frame(function, args, dict(kwargs)).locals
    cells = tuple(zip(traced.__code__.co_freevars, traced.__closure__ or (), strict=True))

    code = traced.__code__
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    own = parameters[0] if isinstance(owner, torch.nn.Module) and parameters else None
    scope = GuardScope(
        owner if isinstance(owner, torch.nn.Module) else None,
        own,
        frozenset({*parameters, *(name[3:-2] for name in variadic)} - {own}),
        dict(cells),
        captured.f_globals,
    )
    checks = Checks(code, captured, context, frame_locals, cells, scope)

    own_args = args if owner is None else (owner, *args)

    def run_bytecode(compiled: Callable[..., Any]) -> Any:
        function = out.forward_callable(compiled_fn=compiled, extra_globals=captured.f_globals)
        return function(*own_args, **kwargs)

    def inputs() -> tuple[Any, ...]:
        fetched: list[tuple[Any, ...]] = []

        def fetch(*values: Any) -> None:
            fetched.append(values)
            raise _Fetched

        with contextlib.suppress(_Fetched):
            run_bytecode(fetch)
        return fetched[0]

    def result(outputs: Sequence[Any]) -> Any:
        return run_bytecode(lambda *_: outputs)

    return DynamoCapture(
        graph_module,
        placeholders,
        inputs,
        result,
        checks,
        tuple(captured.traced_code),
        frozenset(
            symbol
            for symbol, sources in env.var_to_sources.items()  # type: ignore[union-attr]
            if any(
                isinstance(source, TensorPropertySource) and source.prop is TensorProperty.SIZE
                for source in sources
            )
        ),
        lambda symbols: assumptions(env, symbols),
        effects,
    )


# --- one ShapeEnv a range --------------------------------------------------------------


@dataclass(frozen=True)
class RangeShapes:
    """A fresh ShapeEnv whose one symbol is the size of a range."""

    env: Any
    fake_mode: Any
    size: int | torch.SymInt
    """The size in this environment; a plain int for a single size."""
    bounds: tuple[int, int]

    @property
    def symbols(self) -> Symbols:
        """The size symbol, or nothing for a single size."""
        return {} if isinstance(self.size, int) else {self.size.node.expr: size_symbol()}

    def value(self, like: object, symbols: Symbols) -> Any:
        """A placeholder's captured value, made anew with its sizes in this environment."""
        if isinstance(like, torch.Tensor):
            with self.fake_mode:
                return torch.empty_strided(
                    [self._dim(d, symbols) for d in like.shape],
                    [self._dim(d, symbols) for d in like.stride()],
                    dtype=like.dtype,
                    device=like.device,
                )
        return self._dim(like, symbols)

    def _dim(self, value: Any, symbols: Symbols) -> int | torch.SymInt:
        import sympy

        expr = expression(value)
        assert expr is not None
        expr = in_terms_of_size(expr, symbols)
        if not expr.free_symbols:
            return int(expr)
        if isinstance(self.size, int):
            return int(expr.xreplace({size_symbol(): sympy.Integer(self.size)}))
        own = self.size.node.expr
        if expr == size_symbol():
            return self.size
        hint = int(expr.xreplace({size_symbol(): sympy.Integer(self.size.node.hint)}))
        made: torch.SymInt = self.env.create_symintnode(
            expr.xreplace({size_symbol(): own}), hint=hint
        )
        return made


def range_shapes(start: int, end: int, hint: int) -> RangeShapes:
    """A ShapeEnv of its own for the sizes [start, end]; no symbol at all for a single one."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StrictMinMaxConstraint,
    )
    from torch.utils._sympy.value_ranges import ValueRanges

    # Duck shaping would make another dimension that equals the hint the same symbol.
    env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    if start == end:
        return RangeShapes(env, mode, start, (start, end))
    source = ConstantSource("size")
    symbol = env.create_symbol(
        hint,
        source=source,
        dynamic_dim=DimDynamic.DYNAMIC,
        constraint_dim=StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(start, end)),
        do_not_specialize_zero_one=True,
    )
    return RangeShapes(
        env, mode, env.create_symintnode(symbol, hint=hint, source=source), (start, end)
    )


# --- Inductor --------------------------------------------------------------------------


def inductor_options() -> frozenset[str]:
    """The names of Inductor's options."""
    return frozenset(torch._inductor.list_options())


@dataclass(frozen=True)
class InductorGraph:
    """A compiled graph, and what there is to it apart from AOTAutograd's run-time wrapper."""

    call: Callable[..., Sequence[Any]]
    """Takes the graph's inputs, through all wrappers."""
    source: str
    """The Python module that Inductor wrote."""
    names: Mapping[str, Any]
    """The globals of that module, its kernels among them."""
    mutated: tuple[int, ...]
    """Inputs that the graph updates in place."""
    wrapped: str
    """What the wrappers have to do at a call, or ""."""
    kernels: tuple[Kernel, ...]
    """C++ kernels that are to be built before a call."""


def inductor_compile(
    graph_module: fx.GraphModule,
    shapes: RangeShapes,
    inputs: Sequence[Any],
    graph_pass: Callable[[fx.Graph], None],
    graph_pass_uuid: str,
    options: Mapping[str, Any],
    questions: Questions | None = None,
) -> InductorGraph:
    """Compile a graph for one range; the module itself is left as it is.

    `graph_pass` runs before Inductor's own post-grad passes. Its uuid, which must hold all
    that distinguishes ranges, goes into Inductor's cache keys: they would otherwise take
    the graph of another range or hint for this one. `questions` notes what is asked about the
    size, for which the graph must not come from a cache.
    """
    import torch._functorch.config as functorch_config
    import torch._inductor as inductor
    import torch.compiler.config as compiler_config
    import torch.fx.experimental._config as fx_config
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Adapter(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            graph_pass(graph)

        def uuid(self) -> str:
            return graph_pass_uuid

    made: list[tuple[Any, Any]] = []

    def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        graph = compile_fx_inner(gm, example_inputs, **kwargs)
        made.append((graph, TracingContext.get().fw_metadata))
        return graph

    with (
        compile_lock(),
        torch.inference_mode(False),
        torch.no_grad(),
        fx_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        compiler_config.patch(cache_key_tag=graph_pass_uuid),  # type: ignore[attr-defined]
        # What it would keep holds no metadata of the graph, only the finished callable.
        functorch_config.patch(enable_autograd_cache=False),
        quick_isa_checks(),
        traces_alone(),
        whole_files(),
        dtype_rules_made_once(),
        questions.noted() if questions is not None else contextlib.nullcontext(),
        waiting_kernels() as kernels,
        _quiet("torch._inductor.standalone_compile"),  # that without its cache it keeps nothing
    ):
        artifact = inductor.standalone_compile(
            graph_module,
            list(inputs),
            dynamic_shapes="from_example_inputs",
            fake_mode=shapes.fake_mode,
            options={
                "inner_compile": compile_inner,
                "config_patches": {
                    **options,
                    "post_grad_custom_pre_pass": Adapter(),
                    **({"fx_graph_cache": False} if questions is not None else {}),
                },
            },
        )
    # The artifact's own __call__ does nothing but forward to this, at 1 us a piece.
    call: Callable[..., Sequence[Any]] = artifact._compiled_fn
    if len(made) != 1:
        more = f"{len(made)} graphs instead of one"
        return InductorGraph(call, "", {}, (), more, tuple(kernels))
    graph, metadata = made[0]
    function = getattr(graph.current_callable, "__func__", graph.current_callable)
    names = getattr(function, "__globals__", {})
    for name, value in list(names.items()):
        if isinstance(value, Kernel):
            value.put(names, name)
            kernels.append(value)  # Inductor may have had the module from before
    return InductorGraph(
        call,
        getattr(graph, "source_code", ""),
        names,
        tuple(metadata.mutated_graph_handled_indices) if metadata else (),
        _wrapped(graph, metadata),
        tuple(dict.fromkeys(kernels)),
    )


def _wrapped(graph: Any, metadata: Any) -> str:
    """What AOTAutograd's and Inductor's wrappers around a graph have to do at a call; "" when
    that is nothing.

    One thing they do is left out here: counting up the version of inputs updated in place.
    """
    from torch._functorch._aot_autograd.schemas import PlainTensorMeta

    if metadata is None:
        return "no metadata"
    plain = [*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta]
    indices = range(len(metadata.input_info))
    duties = {
        "inputs to copy back to": metadata.num_mutated_inp_runtime_indices,
        "outputs that are views of inputs": metadata.num_outputs_aliased,
        "bases of views": metadata.num_intermediate_bases,
        "effect tokens": len(metadata.tokens),
        "random state": metadata.is_rng_op_functionalized or metadata.num_graphsafe_rng_states,
        "grad mode": metadata.grad_enabled_mutation is not None,
        "collectives to wait for": len(metadata.act_input_indices),
        "tensor subclasses": not all(type(each) is PlainTensorMeta for each in plain)
        or [each.unwrapped_idx for each in metadata.subclass_inp_meta] != list(indices),
        "autocast": torch._C._is_any_autocast_enabled(),
        "inputs to align": len(graph.inputs_to_check),
        "constants": len(graph.constants or ()) + len(graph.frozen_param_names),
        "objects": len(graph.torchbind_constants) + len(graph.opaque_value_type_classes),
        "compiled regions": graph._wrap_compiled_regions,
        "devices": set(graph.device_types) != {"cpu"},
    }
    return ", ".join(name for name, some in duties.items() if some)


# --- building C++ ----------------------------------------------------------------------

TORCH_VERSION: str = torch.__version__
CXX11_ABI: bool = torch.compiled_with_cxx11_abi()


def cpp_compiler() -> str | None:
    """The path of the C++ compiler that Inductor uses; None when it would find none.

    Inductor's own search costs a second for the import of its C++ builder. The same answer
    comes at once from what that reads, `CXX` and the platform's default, unless Inductor was
    configured otherwise or has a compiler of its own installed by conda.
    """
    inductor_config = sys.modules.get("torch._inductor.config")
    if inductor_config is None and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        named = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        return shutil.which(named)
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None


def include_folders() -> tuple[Path, ...]:
    """The folders of torch's C++ headers."""
    include = Path(torch.__file__).parent / "include"
    return (include, include / "torch" / "csrc" / "api" / "include")


def library_folder() -> Path:
    """The folder of torch's shared libraries."""
    return Path(torch.__file__).parent / "lib"


def load_library(path: Path) -> None:
    """Load a shared library and register the operators in it.

    Raises:
        OSError: when it cannot be loaded.
    """
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]


_NOTE = "splitpoint "


def keep_note(text: str) -> None:
    """Keep a text with the graph that Inductor compiles now: `take_notes` returns it after the
    compile, and after each that takes the graph from Inductor's caches instead. They count
    what they do by name, and keep the counts with a graph; a note is such a name."""
    from torch._dynamo.utils import counters

    counters["inductor"][_NOTE + text] += 1


def take_notes() -> dict[str, int]:
    """The notes of the graphs compiled or loaded since the last call, with how often each was
    kept; forgets them."""
    from torch._dynamo.utils import counters

    own = counters["inductor"]
    names = [name for name in own if name.startswith(_NOTE)]
    return {name.removeprefix(_NOTE): own.pop(name) for name in names}


# --- graphs as passes see them ---------------------------------------------------------


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call to a graph at its insertion point, with the fake value that it has."""
    node = graph.call_function(target, args, kwargs)
    fakes, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    values = (n.meta.get("val") for n in graph.nodes)
    with next(v for v in values if isinstance(v, torch._subclasses.FakeTensor)).fake_mode:
        node.meta["val"] = target(*fakes, **fake_kwargs)
    return node


def size_at(given: Any, size: int) -> int:
    """What a dimension that depends on the size of a range is at one size."""
    if not isinstance(given, torch.SymInt):
        return int(given)
    expression = given.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, size)))


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Let operators compute where a fake tensor mode is on."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def is_random(target: Any) -> bool:
    """Whether an operator gives something else at each call."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def sort_graph(graph: fx.Graph) -> None:
    """Put nodes after what they use, changing the order as little as that takes."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


# --- oneDNN ----------------------------------------------------------------------------


def onednn_linear_available(dtype: torch.dtype) -> bool:
    """Whether oneDNN has linear layers over weights in its own layout for a dtype."""
    return bool(torch._C._has_mkldnn) and (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def onednn_pack(weight: torch.Tensor) -> torch.Tensor:
    """A [n, k] weight in oneDNN's own layout, an opaque tensor. The layout does not depend on
    the number of tokens in a way that could be measured."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., k] to [..., n] over a weight that `onednn_pack` made."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def prepacked_linear(
    weight: torch.Tensor,
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function [tokens, k] to [tokens, n] by oneDNN, over its own layout of a [n, k] weight;
    None when this torch has no oneDNN or it has no such layer for the dtype."""
    if not onednn_linear_available(weight.dtype):
        return None
    packed = onednn_pack(weight)
    return lambda x: onednn_linear(x, packed)


def onednn_linear_op() -> Any:
    """`onednn_linear` as an operator of its own: Inductor's lowering of the one beneath takes
    weights only as constants of the graph."""
    _onednn_library()
    return torch.ops.splitpoint_onednn.linear.default


@functools.cache  # a library unregisters what it defined when it is collected
def _onednn_library() -> torch.library.Library:
    library = torch.library.Library("splitpoint_onednn", "DEF")  # type: ignore[no-untyped-call]
    schema = "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"
    library.define(schema)  # type: ignore[no-untyped-call]
    # An opaque weight has a dispatch key of its own, which comes before CPU.
    for key in ("CPU", "MkldnnCPU"):
        library.impl("linear", onednn_linear, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(
        "splitpoint_onednn::linear",
        lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
        lib=library,
    )
    return library


@contextlib.contextmanager
def fresh_inductor_cache() -> Iterator[None]:
    """An empty Inductor cache inside the context, on disk and in memory; removed after it.

    Inductor has one of its own, which leaves the folder behind, and says so, when anything is
    raised inside it.
    """
    from torch._inductor.utils import clear_caches

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folders = {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        }
        clear_caches()
        try:
            with patch.dict(os.environ, folders):
                yield
        finally:
            clear_caches()
