"""Private torch names behind tracing: unnoticed by other threads, and without what only logs show.

Checked on torch 2.13.0.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch


@contextmanager
def traces_alone() -> Iterator[None]:
    """Inside, functions of `torch.compile` can be called in other threads while this one traces.

    FX says in a global of its module that a trace is under way, in whatever thread, and
    `torch.compile` refuses calls meanwhile, to catch traces of its own functions. Inside, FX's
    tracer is the same function over a copy of that module's globals, which nobody else reads.
    Held under Dynamo's lock, as it is one for the whole process.
    """
    from torch._dynamo import disable
    from torch._dynamo.eval_frame import TorchPatcher, innermost_fn
    from torch.fx import Tracer

    TorchPatcher.patch()  # once in a process; not by another thread meanwhile
    trace = innermost_fn(Tracer.trace)  # Dynamo wraps it, so as not to go through it
    assert "_is_fx_tracing_flag" in trace.__code__.co_names
    alone = types.FunctionType(
        trace.__code__,
        {**trace.__globals__, "_is_fx_tracing_flag": False},
        trace.__name__,
        trace.__defaults__,
        trace.__closure__,
    )
    alone.__kwdefaults__ = trace.__kwdefaults__
    with patch.object(Tracer, "trace", disable(alone)):  # type: ignore[no-untyped-call]
        yield


@contextmanager
def no_source_lines() -> Iterator[None]:
    """Inside, Dynamo does not write at each node which lines of the model it comes from.

    That takes 5 % of a capture and serves comments in generated code only; with any of torch's
    logs on they are written. Where errors and assumptions come from is said nevertheless.
    Held under Dynamo's lock.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    from torch._logging._internal import log_state

    with ExitStack() as stack:
        if not (log_state.artifact_names or log_state.log_qname_to_level):
            # Frames of which this is true are left out of a node's stack; nothing else asks.
            name = "is_co_filename_from_nn_modules"
            assert name in vars(InstructionTranslatorBase)
            stack.enter_context(patch.object(InstructionTranslatorBase, name, lambda _: True))
            # What a log line starts with.
            name = "get_line_of_code_header"
            assert name in vars(InstructionTranslatorBase)
            stack.enter_context(
                patch.object(InstructionTranslatorBase, name, lambda _, lineno=None: str(lineno))
            )
        yield
