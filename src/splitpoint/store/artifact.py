"""What the compiler made of one piece for one range, as an entry of a store and back.

An artifact is the text of the function around the kernels, the kernels' shared libraries and
what the compiler assumed of the size. Nothing in it is pickled, and it holds no path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _torch_wrapper
from ..compilers.wrapper import Wrapper
from .store import Store

log = logging.getLogger("splitpoint")

KIND = "pieces"


@dataclass(frozen=True)
class Artifact:
    """A compiled piece, loaded."""

    call: Callable[..., Sequence[Any]]
    """Takes the size if the piece does, then its tensors; returns its outputs."""
    kernels: Mapping[str, Callable[..., Any]]
    entry: Mapping[str, Any]
    """What was kept with it."""


def keep(
    store: Store,
    key: str,
    fields: Mapping[str, str],
    wrapper: Wrapper,
    kernels: Mapping[str, Callable[..., Any]],
    facts: Mapping[str, Any],
) -> bool:
    """Keep a compiled piece with some facts (JSON); False when that is not possible."""
    digests: dict[str, str] = {}
    for name in wrapper.kernels:
        try:
            data = _torch_wrapper.kernel_library(kernels[name]).read_bytes()
        except (AttributeError, TypeError, OSError) as error:
            log.info("store: the library of kernel %s cannot be read: %s", name, error)
            return False
        digest = store.write_object(data)
        if digest is None:
            return False
        digests[name] = digest
    entry = {
        **facts,
        "fields": dict(fields),
        "source": wrapper.source,
        "operators": dict(wrapper.operators),
        "kernels": digests,
        "objects": sorted(set(digests.values())),
    }
    return store.write(KIND, key, entry)


def load(store: Store, key: str, loaded: dict[str, Callable[..., Any]]) -> Artifact | None:
    """A kept piece, or None when there is none that can be used here.

    `loaded` holds kernels by digest; those loaded now are added.
    """
    entry = store.read(KIND, key)
    if entry is None:
        return None
    try:
        kernels = {}
        for name, digest in entry["kernels"].items():
            if digest not in loaded:
                path = store.object(digest)
                if path is None:
                    return None
                loaded[digest] = _torch_wrapper.load_kernel(path, f"splitpoint_{digest[:16]}")
            kernels[name] = loaded[digest]
        wrapper = Wrapper(entry["source"], tuple(kernels), entry["operators"])
        return Artifact(wrapper.bind(kernels), kernels, entry)
    except (ImportError, LookupError, OSError, TypeError, AttributeError, SyntaxError) as error:
        log.warning("store: piece %s cannot be used here: %s", key[:16], error)
        return None
