"""Dynamo's guards of one capture: checked as a whole, in part, and read as expressions."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from .guard_expressions import GuardScope, NotPortable, expressions, rooted
from .probe import fits
from .state import interposed, no_dispatch_modes

Sees = Callable[[str, GuardScope], bool]
"""Whether changes of an expression's value are seen elsewhere."""


ALL_GUARDS: dict[str, Any] = {
    "skip_nnmodule_hook_guards": False,
    # In torch 2.11 these are on, and tensors whose data was exchanged, or other defaults of
    # functions, pass unseen.
    "use_recursive_dict_tags_for_guards": False,
    "skip_tensor_guards_with_matching_dict_tags": False,
    "skip_guards_on_constant_func_defaults": False,
}
"""Settings of Dynamo under which no guard is left out for speed."""


_THREADS = "GLOBAL_STATE changed: num_threads", "torch.set_num_threads() was called"
"""What Dynamo says of another number of threads, which compiled loops are divided by, and what did
it."""


class Checks:
    """The guards of one capture.

    They are evaluated against the arguments that were captured with: what they hold of the
    module and of globals is live, what they hold of arguments is constant.

    Args:
        code: the code of the function that was captured.
        captured: Dynamo's `GraphCaptureOutput`.
        context: the tracing context that the capture ended with.
        arguments: the function's locals as a call starts, closure included.
        cells: the function's closure by name.
        scope: what the guards' names are relative to.
    """

    def __init__(
        self,
        code: types.CodeType,
        captured: Any,
        context: Any,
        arguments: dict[str, Any],
        cells: Sequence[tuple[str, types.CellType]],
        scope: GuardScope,
    ) -> None:
        self._code = code
        self._captured = captured
        self._context = context
        self._arguments = arguments
        self._cells = cells
        self.scope = scope
        self._guards: list[Any] | None = None
        """None where guards can be told from each other by Dynamo alone."""
        if fits("single guards"):
            self._guards = sorted(captured.output_graph.guards, key=lambda each: each.sort_key())
        self._all = self._build(self._guards)
        self.check = self._checker(self._all)
        """Whether everything that was guarded still is as it was."""
        self._rest: tuple[list[str], Callable[[], bool]] | None = None
        """What was seen elsewhere when `rest` was last asked for, and the check of the others."""

    def reached(self) -> dict[str, torch.nn.Module | torch.Tensor]:
        """The modules and tensors that guards are about, by the expressions that lead to them,
        without what lies in the tree of one of these modules."""
        found: dict[str, torch.nn.Module | torch.Tensor] = {}
        for entry in self._entries() if self._guards is not None else ():
            if isinstance(entry.value, (torch.nn.Module, torch.Tensor)):
                code = rooted(entry.name, self.scope)
                if code is not None:
                    found[code] = entry.value
        trees: list[str] = []
        for code in sorted(found, key=len):
            if _is_in_trees(code, trees):
                del found[code]
            elif isinstance(found[code], torch.nn.Module):
                trees.append(code)
        return found

    def rest(
        self, trees: Sequence[str], places: Collection[str], tensors: Collection[int], sees: Sees
    ) -> Callable[[], bool]:
        """`check` without what a watch over module trees and tensors sees anyway, and without the
        expressions that are seen elsewhere. All guards hold.

        Args:
            trees: expressions that lead to the modules watched. That they do is watched, too.
            places: expressions that lead to tensors, likewise.
            tensors: ids of all tensors that are watched.
        """
        if self._guards is None:
            return self.check
        if self._rest is not None and all(sees(code, self.scope) for code in self._rest[0]):
            return self._rest[1]
        seen: list[str] = []
        kept: list[Any] = []
        entries = self._entries()
        for entry in entries:
            if _is_covered(entry, self.scope, trees, places, tensors):
                continue
            if (code := _seen(entry, self.scope, tensors, sees)) is not None:
                seen.append(code)
            else:
                kept.append(entry.orig_guard)
        self._rest = seen, self._checker(self._build(kept))
        return self._rest[1]

    def read(self, bound: Collection[int]) -> dict[str, None]:
        """What tracing read, as expressions, without the tensors with these ids.

        Raises:
            NotPortable: for a guard that cannot be written so.
        """
        if self._guards is None:
            raise NotPortable("guards that this version of torch does not tell apart")
        return expressions(self._entries(), self.scope, bound)

    def explain(self) -> str:
        """Which guard no longer holds."""
        with no_dispatch_modes(), torch.inference_mode(False), torch.no_grad():
            parts = self._all.check_verbose(self._arguments).verbose_code_parts
        # What Dynamo advises on parameters is for torch.compile.
        said = (part.split(" Guard failed on a parameter")[0].rstrip(". ") for part in parts)
        return "; ".join(part.replace(*_THREADS) for part in said)

    def _build(self, guards: Iterable[Any] | None) -> Any:
        """Dynamo's manager of some of the guards, or of all. They go by what is there now."""
        import torch._dynamo.config as dynamo_config
        from torch._dynamo.hooks import Hooks
        from torch._dynamo.utils import dynamo_timed, get_metrics_context
        from torch._guards import tracing

        captured = self._captured
        if guards is not None:
            captured = dataclasses.replace(captured, output_graph=self._graph_with(guards))
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            dynamo_config.patch(**ALL_GUARDS),
            tracing(self._context),
            get_metrics_context(),
            dynamo_timed("splitpoint_build_guards", log_pt2_compile_event=True),
        ):
            return captured.build_guards(self._code, hooks=Hooks()).guard_manager

    def _graph_with(self, guards: Iterable[Any]) -> Any:
        """Dynamo's graph with these guards only."""
        from torch._guards import GuardsSet
        from torch.utils._ordered_set import OrderedSet

        graph = copy.copy(self._captured.output_graph)
        graph._guards = GuardsSet(OrderedSet(guards))
        for guard in graph.guards:  # what an earlier build left on them
            guard.guard_types = guard.guarded_class_weakref = None
            guard.code_list = guard.obj_weakref = None
        return graph

    def _checker(self, manager: Any) -> Callable[[], bool]:
        holds, arguments, cells = manager.check, self._arguments, self._cells

        def check() -> bool:
            for name, cell in cells:  # a closure's variables may have been set anew
                arguments[name] = cell.cell_contents
            if torch.is_inference_mode_enabled() or interposed():
                with no_dispatch_modes(), torch.inference_mode(False), torch.no_grad():
                    return bool(holds(arguments))
            return bool(holds(arguments))

        return check

    def _entries(self) -> list[Any]:
        """The guards with what they are about now."""
        from torch._dynamo.guards import make_guard_filter_entry

        assert self._guards is not None
        values: Any = _Values(self._captured.output_graph)
        return [make_guard_filter_entry(guard, values) for guard in self._guards]


class _Values:
    """What guards are about, as Dynamo's `GuardBuilder` finds it."""

    def __init__(self, graph: Any) -> None:
        from torch._dynamo.guards import _get_closure_vars

        self._globals = {"L": graph.local_scope, "G": graph.global_scope}
        self._names = dict(_get_closure_vars())
        self._found: dict[Any, Any] = {}

    def get(self, guard: Any) -> Any:
        return guard.originating_source.get_value(self._globals, self._names, self._found)


_IN_TREE = re.compile(
    r"(?:\._modules(?:\['[^']*'\])?)*"
    r"(?:\.(?:_parameters|_buffers)(?:\['[^']*'\])?|\.\w+)?$"
)
"""What follows a module's name in the name of something that its tree's dicts hold."""

_CONSTANTS = (bool, int, float, str, type(None), type, torch.dtype, torch.device)


def _is_in_trees(code: str | None, trees: Sequence[str]) -> bool:
    """Whether an expression reads what the dicts of module trees hold, or leads to one of them."""
    return code is not None and any(
        code.startswith(tree) and _IN_TREE.match(code, len(tree)) is not None for tree in trees
    )


def _is_covered(
    entry: Any,
    scope: GuardScope,
    trees: Sequence[str],
    places: Collection[str],
    tensors: Collection[int],
) -> bool:
    """Whether a guard depends on no more than what is watched, as `Checks.rest` takes it."""

    def is_watched(name: str) -> bool:
        code = rooted(name, scope)
        return code in places or _is_in_trees(code, trees)

    value = entry.value
    if isinstance(value, torch.Tensor):
        if id(value) not in tensors or not is_watched(entry.name):
            return False
        other = getattr(entry.orig_guard.create_fn, "keywords", {}).get("source_b")
        return other is None or is_watched(other.name)
    if not _is_in_trees(rooted(entry.name, scope), trees):
        return False
    # A dict of the tree is compared as a whole; of other containers (a list, a
    # configuration object) only which one it is.
    return isinstance(value, (*_CONSTANTS, torch.nn.Module)) or entry.name.endswith(
        ("._modules", "._parameters", "._buffers")
    )


def _seen(entry: Any, scope: GuardScope, tensors: Collection[int], sees: Sees) -> str | None:
    """The expression of a guard if what it depends on is seen elsewhere."""
    try:
        found = expressions([entry], scope, tensors)
    except NotPortable:
        return None
    return next((code for code in found if sees(code, scope)), None)
