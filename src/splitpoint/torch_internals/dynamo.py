"""One run of Dynamo over a callable: its graph, its guards and where its inputs come from."""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import linecache
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .assumptions import Assumed, read_assumptions
from .guard_checks import ALL_GUARDS, Checks
from .guard_expressions import GuardScope
from .probe import fits, require
from .process import compile_lock, quiet
from .sizes import Symbols

if TYPE_CHECKING:
    import sympy


@dataclass(frozen=True)
class DynamoCapture:
    """What one run of Dynamo over a callable gives."""

    graph_module: fx.GraphModule
    placeholders: tuple[Any, ...]
    """The value (fake tensor, SymInt, ...) of each graph input."""
    inputs: Callable[[], tuple[Any, ...]]
    """Fetches the graph inputs anew from the module, closures and example arguments."""
    result: Callable[[Sequence[Any], tuple[Any, ...], Mapping[str, Any]], Any]
    """What the callable returns for given graph outputs, and arguments that may stand for those
    of the capture."""
    checks: Checks
    """What was guarded."""
    traced_code: tuple[Any, ...]
    """The code objects that tracing went through."""
    dimensions: frozenset[sympy.Symbol]
    """The symbols that came into being as a dimension of an argument."""
    places_of: Callable[[sympy.Symbol], list[tuple[torch.Tensor, int]]]
    """The tensors, and their dimensions, that one of these stands for."""
    assumptions: Callable[[Symbols], list[Assumed]]
    """What tracing took for granted, given what the symbols mean."""
    side_effects: tuple[str, ...]
    """Sources of the Python objects the callable changes, as Dynamo names them."""


class DynamoFailure(Exception):
    """Dynamo could not capture the callable; the cause says why."""

    details = ""
    """All that torch said."""
    line = ""
    """Where in the user's code it was, "file.py:12 in forward: y = x.item()", if that is known."""
    is_break = False
    """Whether torch.compile would break the graph there and go on; else the model itself fails."""


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
_RESUMED = re.compile(r"torch_dynamo_resume_in_(\w+?)_at_\d+")
_OBSERVED = "Observed exception"
_RAISED = re.compile(r"^\s*Developer debug context: raised exception (?P<what>.+)$", re.MULTILINE)


def _failure(error: Exception) -> DynamoFailure:
    said = str(error).split("\n\nfrom user code")[0]
    is_raised = said.startswith(_OBSERVED)
    if is_raised and (raised := _RAISED.search(said)):
        said = f"it raises {raised['what']}"
    failure = DynamoFailure(said)
    failure.details = str(error)
    frames = list(_FRAME.finditer(failure.details.partition("from user code")[2]))
    own = [each for each in frames if not each["file"].startswith(_TORCH)] or frames
    if own:
        failure.line = user_line(own[-1]["file"], int(own[-1]["line"]), own[-1]["name"])
    # An operator that refuses its inputs, and an exception that the model raises, are no breaks.
    failure.is_break = not is_raised
    if fits("what a capture failed with"):
        from torch._dynamo.exc import TorchRuntimeError

        failure.is_break &= not isinstance(error, TorchRuntimeError)
    return failure


_TORCH = str(Path(torch.__file__).parent)


def user_line(file: str, number: int, function: str) -> str:
    """A line of the user's code, "file.py:12 in forward: y = x.item()"."""
    code, function = linecache.getline(file, number).strip(), _RESUMED.sub(r"\1", function)
    return f"{file}:{number} in {function}" + (f": {code}" if code else "")


class _Fetched(Exception):
    pass


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo treat a dimension as symbolic, without an error where it cannot."""
    require("capture")
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
    require("capture")
    require("sizes")
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
            **ALL_GUARDS,
        ),
        get_metrics_context(),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            with quiet("torch._subclasses.fake_tensor"):
                out = fullgraph_capture(function, args, dict(kwargs))
        except TorchDynamoException as error:
            raise _failure(error) from error
    effects: tuple[str, ...] = ()
    for warning in caught:
        if found := re.search(r"we found certain side effects.*?(\[.*\])$", str(warning.message)):
            effects = tuple(ast.literal_eval(found[1]))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if out.backend_input is None:
        raise DynamoFailure(
            "the function computes nothing with tensors, so there is nothing to compile: call it "
            "as it is"
        )

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

    sizes: dict[sympy.Symbol, list[TensorPropertySource]] = {}
    for symbol, sources in env.var_to_sources.items():  # type: ignore[union-attr]
        for source in sources:
            if isinstance(source, TensorPropertySource) and source.prop is TensorProperty.SIZE:
                sizes.setdefault(symbol, []).append(source)

    def value_at(source: Any) -> Any:
        name = source.name if isinstance(source.name, str) else source.name()  # torch 2.11
        return eval(name, {**captured.f_globals, "L": frame_locals, "G": captured.f_globals})

    def run_bytecode(
        compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        # Torch 2.11 asks for the builtins that the code names, too.
        names = {**vars(builtins), **captured.f_globals}
        function = out.forward_callable(compiled_fn=compiled, extra_globals=names)
        return function(*(args if owner is None else (owner, *args)), **kwargs)

    def inputs() -> tuple[Any, ...]:
        fetched: list[tuple[Any, ...]] = []

        def fetch(*values: Any) -> None:
            fetched.append(values)
            raise _Fetched

        with contextlib.suppress(_Fetched):
            run_bytecode(fetch, args, kwargs)
        return fetched[0]

    def result(outputs: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return run_bytecode(lambda *_: outputs, args, kwargs)

    return DynamoCapture(
        graph_module,
        placeholders,
        inputs,
        result,
        checks,
        tuple(captured.traced_code),
        frozenset(sizes),
        lambda symbol: [(value_at(source.base), int(source.idx or 0)) for source in sizes[symbol]],
        lambda symbols: read_assumptions(env, symbols),
        effects,
    )
