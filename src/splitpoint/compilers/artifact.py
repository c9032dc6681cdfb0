"""What the compiler made of one piece for one range, as an entry of a store and back.

An artifact is the text of the function around the kernels, the kernels' shared libraries and
what the compiler assumed of the size. Nothing in it is pickled, and it holds no path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..store.store import Store
from ..torch_internals.cpp_kernels import kernel_place
from ..torch_internals.generated_code import load_kernel
from ..torch_internals.triton_kernels import Binary, load_triton_kernel, put_binaries
from .wrapper import Wrapper

log = logging.getLogger("splitpoint")

KIND = "pieces"

Place = list[Any]
"""Where a kernel is: [digest of its library, name], or, of one in Triton, [digest of its text,
name, type of its device, `Files`]."""

Files = Sequence[Sequence[Any]]
"""What Triton made: [its hash of the kernel, index of the device, name, digest] of each file."""


class Missing(Exception):
    """An object that an entry refers to is not in the store, or damaged."""


@dataclass
class Libraries:
    """The libraries of kernels that were loaded from a store, each checked once."""

    _paths: dict[str, Path] = field(default_factory=dict)
    _kernels: dict[tuple[str, str], Callable[..., Any]] = field(default_factory=dict)

    def kernel(
        self, store: Store, digest: str, symbol: str, device: str = "", files: Files = ()
    ) -> Callable[..., Any]:
        """A kernel by the digest of its library and its name there; or, with a device, one in
        Triton by the digest of its text, its name, and what Triton made of it.

        Raises:
            Missing: when the store does not have the library, the text or a file.
            ImportError, AttributeError, LookupError: when it cannot be loaded.
        """
        if device:
            return self._triton_kernel(store, digest, symbol, device, files)
        if digest not in self._paths:
            path = store.library(digest)
            if path is None:
                raise Missing(f"the library {digest} is not there")
            self._paths[digest] = path
        if (digest, symbol) not in self._kernels:
            self._kernels[digest, symbol] = load_kernel(
                self._paths[digest], f"splitpoint_{digest[:16]}", symbol
            )
        return self._kernels[digest, symbol]

    def _triton_kernel(
        self, store: Store, digest: str, symbol: str, device: str, files: Files
    ) -> Callable[..., Any]:
        if (digest, symbol) not in self._kernels:
            binaries = [Binary(of, at, name, _object(store, data)) for of, at, name, data in files]
            source = _object(store, digest).decode()
            try:
                put_binaries(binaries)
            except ValueError as error:
                raise Missing(str(error)) from error
            self._kernels[digest, symbol] = load_triton_kernel(symbol, source, device)
        return self._kernels[digest, symbol]


def _object(store: Store, digest: str) -> bytes:
    data = store.object(digest)
    if data is None:
        raise Missing(f"the object {digest} is not there")
    return data


def objects_of(places: Iterable[Sequence[Any]]) -> set[str]:
    """The digests of all that kernels are loaded from, by their places."""
    found = set()
    for digest, _, *triton in places:
        found.add(digest)
        for file in triton[1] if triton else ():
            found.add(file[3])
    return found


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
    binaries: Sequence[Binary] = (),
) -> bool:
    """Keep a compiled piece, whose kernels are built, with some facts (JSON); False when that is
    not possible."""
    places: dict[str, Place] = {}
    digests: dict[str, str] = {}
    files = []
    for each in binaries:
        if (data := store.write_object(each.data)) is None:
            return False
        files.append([each.kernel, each.device, each.name, data])
    for name in wrapper.kernels:
        if (triton := wrapper.triton.get(name)) is not None:
            if not files or (text := store.write_object(triton.source.encode())) is None:
                return False
            places[name] = [text, triton.name, triton.device, files]
            continue
        try:
            path, symbol = kernel_place(kernels[name])
            digest = digests.get(path) or store.write_object(Path(path).read_bytes())
        except (AttributeError, TypeError, OSError) as error:
            log.info("store: the library of kernel %s cannot be read: %s", name, error)
            return False
        if digest is None:
            return False
        digests[path] = digest
        places[name] = [digest, symbol]
    entry = {
        **facts,
        "fields": dict(fields),
        "source": wrapper.source,
        "operators": dict(wrapper.operators),
        "kernels": places,
        "objects": sorted(objects_of(places.values())),
    }
    return store.write(KIND, key, entry)


def load(store: Store, key: str, libraries: Libraries) -> Artifact | None:
    """A kept piece, or None when there is none that can be used here."""
    entry = store.read(KIND, key)
    if entry is None:
        return None
    try:
        kernels = {name: libraries.kernel(store, *at) for name, at in entry["kernels"].items()}
        wrapper = Wrapper(entry["source"], tuple(kernels), entry["operators"])
        return Artifact(wrapper.bind(kernels), kernels, entry)
    except Missing:
        return None
    except (ImportError, LookupError, OSError, TypeError, AttributeError, SyntaxError) as error:
        log.warning("store: piece %s cannot be used here: %s", key[:16], error)
        return None
