"""A model that no one graph can hold: torch.compile cuts it, and each part has the ranges."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..capture.dims import out_of_plan
from ..capture.signature import Signature
from ..config import Config
from ..errors import (
    CaptureError,
    CutFailed,
    GraphBreak,
    InputError,
    InvalidDynamicDims,
    OutsideGraph,
    SizeOutOfPlan,
    SplitpointError,
)
from ..torch_internals.dynamo import mark_dynamic
from ..torch_internals.graph_breaks import (
    by_inductor,
    cut_and_compile,
    dynamic_results,
    error_of_backend,
    is_of_dynamo,
    where_cut,
)
from ..torch_internals.process import quiet
from .dynamo_backend import Part, part_of

log = logging.getLogger("splitpoint")

TIMED_CALLS = 20
"""Calls without a compile whose time is taken, for the plan to say what being cut costs."""


class Parts:
    """The graphs of a model between the lines where it had to be cut, and what runs them.

    torch.compile decides where to cut and checks its guards at each call; what is not in a graph
    runs in Python as it always did, with all its effects.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        config: Config,
        signature: Signature,
        why: CaptureError,
    ) -> None:
        for name in ("background", "free_original_weights", "mmap_packed_weights"):
            if getattr(config, name):
                refused = GraphBreak(
                    f"{why}\n{name}=True needs one graph: leave it out, or set on_break='error'"
                )
                refused.details = why.details
                raise refused from why
        self.config = config
        self.eager_calls = 0
        """Calls of the model itself, whose sizes are out of the plan."""
        self.parts: list[Part] = []
        self.cuts: dict[str, str] = {}
        """The lines at which the model was cut, and what torch says of the first time."""
        self.without_ranges = 0
        """Graphs that have several sizes, none that their inputs show, or other numbers."""
        self._function = function
        self._signature = signature
        # A part may have a size of its own, such as how many tokens a mask keeps.
        self._config = replace(config, on_out_of_plan="eager")
        self._first = str(why).splitlines()
        self._lock = threading.RLock()
        self._run = cut_and_compile(function, self._compile)
        self._graphs = 0
        self._inside_s = 0.0
        self._times: list[tuple[float, float]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            CompileError, PassError, SizeOutOfPlan: of a part.
            CutFailed: where torch.compile fails by itself.
        """
        if said := self._out_of_plan(args, kwargs):
            if self.config.on_out_of_plan == "error":
                raise SizeOutOfPlan(f"{said}, split the batch, or set on_out_of_plan='eager'")
            self.eager_calls += 1
            return self._function(*args, **kwargs)
        timed = len(self._times) < TIMED_CALLS
        before, self._inside_s, start = self._graphs, 0.0, time.perf_counter()
        try:
            # Without torch's advice on how to capture .item(), which is no way here.
            with torch.no_grad(), quiet("torch._dynamo.variables.tensor"):
                result = self._run(*args, **kwargs)
        except Exception as error:
            # Dynamo wraps what a backend raises; all else is the model's own.
            own = error_of_backend(error)
            if isinstance(own, SplitpointError):
                raise own from error
            if is_of_dynamo(error):
                raise _failed(error) from error
            raise
        if timed and self._graphs == before:
            self._times.append((time.perf_counter() - start, self._inside_s))
        return result

    def _out_of_plan(self, args: tuple[Any, ...], kwargs: Any) -> str | None:
        """Whether the size of a call is too large, and how; of other kinds of arguments than those
        of the first call that is not known."""
        signature = self._signature
        try:
            lengths = signature.explain(signature.bind(args, kwargs))
        except InputError:
            return None
        return out_of_plan(signature.dims, lengths, self.config.max_size)

    def first_call(self, signature: Signature, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The first call of a kind of arguments, whose dynamic dimensions are known."""
        tensors = signature.tensors_in(signature.bind(args, kwargs))
        for leaf, tensor in zip(signature.tensors, tensors, strict=True):
            for dim in leaf.dynamic:
                mark_dynamic(tensor, dim)
        result = self(*args, **kwargs)
        log.warning("%s", "\n".join(self.notes()))
        return result

    def notes(self) -> list[str]:
        """What a plan says of the cuts, and what they cost."""
        count = len(self.parts) + self.without_ranges
        lines = [
            f"torch.compile serves this model in {count} graph{'s' * (count != 1)}, whose guards "
            f"it checks at each call (on_break='split')"
        ]
        cuts = [f"cut at {line} ({said})" for line, said in self.cuts.items()]
        lines += cuts or self._first[:2]
        if self.without_ranges:
            lines.append(
                f"{self.without_ranges} of them have other sizes or numbers too, so no ranges"
            )
        if self._times:
            total, inside = sorted(self._times)[len(self._times) // 2]
            lines.append(
                f"between the graphs a call spends {1e3 * (total - inside):.2f} of "
                f"{1e3 * total:.2f} ms"
            )
        return lines

    def _compile(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with self._lock:
            self._graphs += 1
            if cut := where_cut(graph_module):
                self.cuts.setdefault(*cut)
            try:
                part = part_of(graph_module, self._config)
            except (InvalidDynamicDims, OutsideGraph) as why:
                log.info("a part has no ranges: %s", why)
                self.without_ranges += 1
                return self._timed(self._without_ranges(graph_module, list(inputs)))
            self.parts.append(part)
            return self._timed(part.run, dynamic_results(graph_module))

    def _without_ranges(
        self, graph_module: fx.GraphModule, inputs: list[Any]
    ) -> Callable[..., Any]:
        if self.config.backend == "eager":
            return graph_module.forward
        return by_inductor(graph_module, inputs)

    def _timed(
        self, run: Callable[..., Any], dynamic: Sequence[tuple[int, int]] = ()
    ) -> Callable[..., Any]:
        left = list(dynamic)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                results = run(*args)
            finally:
                self._inside_s += time.perf_counter() - start
            while left:  # at the first call, after which the next graph is made
                index, dim = left.pop()
                mark_dynamic(results[index], dim)
            return results

        return timed


def _failed(error: Exception) -> CutFailed:
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line for line in lines if line and not line.endswith(" raised:")), "")
    made = CutFailed(
        f"torch.compile, which cuts this model (on_break='split'), failed: "
        f"{type(error).__name__}: {said}\n"
        f"rewrite what is not captured (on_break='error' names it); torch's words are in `.details`"
    )
    made.details = str(error)
    return made
