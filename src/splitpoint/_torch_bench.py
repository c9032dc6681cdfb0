"""Private torch names that the benchmarks touch, each with the version it was checked on."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch._inductor.utils import fresh_cache  # torch 2.13


def fresh_inductor_cache() -> AbstractContextManager[None]:
    """An empty Inductor cache inside the context, on disk and in memory; removed after it."""
    return fresh_cache()
