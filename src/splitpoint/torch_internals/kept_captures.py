"""What a compiled function has to be so that others can keep what Dynamo captured."""

from __future__ import annotations

from typing import Any

from .probe import fits


def serializable_callable() -> Any:
    """The class of functions that can be kept beside a capture of Dynamo's; `object` in a version
    of torch that keeps none."""
    if not fits("kept captures"):
        return object
    from torch._dynamo.aot_compile import SerializableCallable  # type: ignore[attr-defined]

    return SerializableCallable
