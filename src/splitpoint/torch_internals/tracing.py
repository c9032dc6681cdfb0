"""Tracing that other threads do not notice."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from .probe import fits


@contextmanager
def traces_alone() -> Iterator[None]:
    """Inside, functions of `torch.compile` can be called in other threads while this one traces.

    Until torch 2.13 FX says in a global of its module that a trace is under way, in whatever
    thread, and `torch.compile` refuses calls meanwhile, to catch traces of its own functions.
    Inside, FX's tracer is the same function over a copy of that module's globals, which nobody
    else reads.
    Held under Dynamo's lock, as it is one for the whole process.
    """
    if not fits("tracing in one thread"):  # from 2.14 on the flag is the thread's own
        yield
        return
    from torch._dynamo import disable
    from torch._dynamo.eval_frame import TorchPatcher, innermost_fn
    from torch.fx import Tracer

    TorchPatcher.patch()  # once in a process; not by another thread meanwhile
    trace = innermost_fn(Tracer.trace)  # Dynamo wraps it, so as not to go through it
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
