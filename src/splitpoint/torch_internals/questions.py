"""What a compile asks about the size, and whether another range would have another answer.

Torch asks its ShapeEnv whether something holds for every size, and leaves an optimisation out
where it cannot tell. What a wider range answers holds in a narrower one too; so only the questions
that the wider one leaves open can have another answer there. Sizes are also estimated by the hint,
to order what is fused and reused, and for two decisions in C++ loops: how they are tiled, which
counts as decided otherwise for every other hint, and whether threads share them, which is decided
for the other hints as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from .probe import fits

if TYPE_CHECKING:
    import sympy

_Question = tuple["sympy.Basic", tuple["sympy.Basic", ...] | None, tuple[Any, ...] | None, bool]
"""An expression; what holds of the loop variables in it, and their ranges; and whether it is asked
with the sizes 0 and 1 left out."""


def can_be_noted() -> bool:
    """Whether this version of torch lets `Questions` see what is asked."""
    return fits("one compile for several ranges")


@dataclass
class Questions:
    """The questions of one compile that were left open."""

    env: Any
    """The ShapeEnv of the compile."""
    size: sympy.Symbol
    """Its size."""
    hints: frozenset[int] = frozenset()
    """Other sizes to tune for."""
    otherwise: set[int] = field(default_factory=set)
    """Those for which loops would be written otherwise."""
    open: dict[_Question, None] = field(default_factory=dict)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is asked inside."""
        from torch._inductor import index_propagation, sizevars
        from torch._inductor.codegen.cpp import CppKernel, CppKernelProxy
        from torch._inductor.sizevars import SizeVarAllocator
        from torch.fx.experimental import symbolic_shapes

        writing = False
        pretended: int | None = None
        evaluate = type(self.env)._maybe_evaluate_static

        def note_open(
            expr: sympy.Basic,
            *,
            unbacked_only: bool = False,
            compute_hint: bool = False,
            size_oblivious: bool = False,
            axioms: tuple[sympy.Basic, ...] | None = None,
            var_to_range: tuple[Any, ...] | None = None,
        ) -> Any:
            found = evaluate(
                self.env,
                expr,
                unbacked_only=unbacked_only,
                compute_hint=compute_hint,
                size_oblivious=size_oblivious,
                axioms=axioms,
                var_to_range=var_to_range,
            )
            if found is None and not compute_hint:
                self._note(expr, axioms, var_to_range, size_oblivious)
            return found

        note_open.cache_clear = evaluate.cache_clear  # type: ignore[attr-defined]

        def unless_hint_disproves(original: Callable[..., bool]) -> Callable[..., bool]:
            def known(env: Any, expr: Any, axioms: Any = None, var_to_range: Any = None) -> bool:
                found = original(env, expr, axioms, var_to_range)
                if not found and env is self.env and not isinstance(expr, bool):
                    self._note(expr, axioms, var_to_range, False)
                return found

            return known

        def codegen(original: Callable[..., Any]) -> Callable[..., Any]:
            def write(*args: Any) -> Any:
                nonlocal writing
                writing = True
                try:
                    return original(*args)
                finally:
                    writing = False

            return write

        def share(original: Callable[..., Any]) -> Callable[..., Any]:
            def decide_depth(*args: Any) -> Any:
                nonlocal pretended
                decided = original(*args)
                try:
                    for pretended in self.hints:
                        if original(*args) != decided:
                            self.otherwise.add(pretended)
                finally:
                    pretended = None
                return decided

            return decide_depth

        def hint(original: Callable[..., int]) -> Callable[..., int]:
            def estimate(sizes: Any, expr: Any, fallback: int | None = None) -> int:
                if getattr(expr, "free_symbols", ()):
                    whole = sizes.remove_precomputed_replacements(expr)
                    if writing and self.size in whole.free_symbols:
                        self.otherwise |= self.hints
                    if pretended is not None:
                        return original(sizes, whole.subs(self.size, pretended), fallback)
                return original(sizes, expr, fallback)

            return estimate

        known = unless_hint_disproves(sizevars.statically_known_true)
        with (
            patch.object(self.env, "_maybe_evaluate_static", note_open),
            patch.object(sizevars, "statically_known_true", known),
            patch.object(index_propagation, "statically_known_true", known),
            # The hint would answer before the question is asked.
            patch.object(symbolic_shapes, "_sym_node_hint_disproves", lambda *_, **__: False),
            patch.object(
                CppKernelProxy, "codegen_functions", codegen(CppKernelProxy.codegen_functions)
            ),
            patch.object(
                CppKernel, "decide_parallel_depth", share(CppKernel.decide_parallel_depth)
            ),
            patch.object(
                SizeVarAllocator, "optimization_hint", hint(SizeVarAllocator.optimization_hint)
            ),
        ):
            yield

    def _note(self, expr: Any, axioms: Any, var_to_range: Any, size_oblivious: bool) -> None:
        about = set(expr.free_symbols)
        about.update(*(getattr(each, "free_symbols", ()) for each in axioms or ()))
        if self.size in about:
            self.open[expr, axioms, var_to_range, size_oblivious] = None

    def answered_by(self, env: Any) -> bool:
        """Whether a ShapeEnv of a narrower range of the same size has an answer to one that makes
        a difference. "No" makes none: where it is told from "maybe" there is a guard."""
        import sympy

        interval = env.var_to_range[self.size]
        for expr, axioms, ranges, size_oblivious in self.open:
            known = ranges and tuple((s, interval if s == self.size else r) for s, r in ranges)
            found = env._maybe_evaluate_static(
                expr, axioms=axioms, var_to_range=known, size_oblivious=size_oblivious
            )
            if found is not None and found is not sympy.false:
                return True
        return False
