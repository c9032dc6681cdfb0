"""One compile by Inductor: a graph for a range, and what is around its kernels."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from .cpp_files import whole_files
from .cpp_kernels import Kernel, waiting_kernels
from .instruction_sets import quick_isa_checks
from .probe import fits, require
from .process import compile_lock, quiet
from .questions import Questions
from .sizes import RangeShapes
from .tracing import traces_alone
from .triton_kernels import Binary, binaries_of
from .wrapper_duties import duties


def inductor_options() -> frozenset[str]:
    """The names of Inductor's options."""
    require("compile")
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
    """What the wrappers have to do at a call, or ""; then `mutated` is not known."""
    kernels: tuple[Kernel, ...]
    """C++ kernels that are to be built before a call."""
    to_align: tuple[int, ...] = ()
    """Inputs that its kernels assume to be aligned; known where nothing is wrapped."""
    binaries: tuple[Binary, ...] = ()
    """What Triton made of its kernels."""


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
    require("compile")
    require("sizes")
    require("capture")
    import torch._functorch.config as functorch_config
    import torch._inductor as inductor
    import torch.compiler.config as compiler_config
    import torch.fx.experimental._config as fx_config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Adapter(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            graph_pass(graph)

        def uuid(self) -> str:
            return graph_pass_uuid

    made: list[tuple[Any, Any]] = []

    def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        with code_even_without_calls(gm.graph):
            graph = compile_fx_inner(gm, example_inputs, **kwargs)
        context = TracingContext.get()
        made.append((graph, context.fw_metadata if fits("duties of wrappers") else None))
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
        questions.noted() if questions is not None else contextlib.nullcontext(),
        waiting_kernels() as kernels,
        tracing(TracingContext(shapes.fake_mode)),
        quiet("torch._inductor.standalone_compile"),  # that without its cache it keeps nothing
    ):
        # In a context of its own: from torch 2.15 on settings are context variables, and Inductor
        # leaves some set that were not, which guards tell apart.
        artifact = contextvars.copy_context().run(
            inductor.standalone_compile,
            graph_module,
            list(inputs),
            dynamic_shapes="from_tracing_context",
            options={
                "inner_compile": compile_inner,
                "config_patches": {
                    **options,
                    "post_grad_custom_pre_pass": Adapter(),
                    **({"fx_graph_cache": False} if questions is not None else {}),
                },
            },
        )
    call: Callable[..., Sequence[Any]] = artifact
    if fits("artifact's function"):  # all that __call__ does is to forward to it
        call = artifact._compiled_fn
    if len(made) != 1:
        more = f"{len(made)} graphs instead of one"
        return InductorGraph(call, "", {}, (), more, tuple(kernels))
    graph, metadata = made[0]
    around = duties(graph, metadata)
    called = _own_function(getattr(graph, "current_callable", None))
    names = getattr(getattr(called, "__func__", called), "__globals__", {})
    for name, value in list(names.items()):
        if isinstance(value, Kernel):
            value.put(names, name)
            kernels.append(value)  # Inductor may have had the module from before
    return InductorGraph(
        call,
        getattr(graph, "source_code", ""),
        names,
        () if around else tuple(metadata.mutated_graph_handled_indices),
        around,
        tuple(dict.fromkeys(kernels)),
        () if around else tuple(graph.inputs_to_check),
        () if around else binaries_of(graph),
    )


def _own_function(called: Any) -> Any:
    """The function that Inductor wrote, without what aligns its inputs on CUDA."""
    if inspect.isfunction(called) and called.__closure__:
        return inspect.getclosurevars(called).nonlocals.get("model", called)
    return called


def code_even_without_calls(graph: fx.Graph) -> contextlib.AbstractContextManager[Any]:
    """Inside, Inductor writes code for a graph that calls nothing too, which it otherwise leaves to
    fx: it does so when the code is to be cached with AOTAutograd's."""
    calls = ("call_function", "call_method", "call_module")
    if any(node.op in calls for node in graph.nodes) or not fits(
        "code for graphs that compute nothing"
    ):
        return contextlib.nullcontext()
    import torch._functorch.config as functorch_config

    patched: contextlib.AbstractContextManager[Any] = functorch_config.patch(
        bundled_autograd_cache=True
    )
    return patched


@contextlib.contextmanager
def fresh_inductor_cache() -> Iterator[None]:
    """An empty Inductor cache inside the context, on disk and in memory; removed after it.

    Inductor has one of its own, which leaves the folder behind, and says so, when anything is
    raised inside it.
    """
    require("compile")
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
