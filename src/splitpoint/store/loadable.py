"""Names under which a shared library can be loaded whose bytes were checked: those and no others.

The loader is given a name and opens the file itself. A name in a store may lead to another file
by then; that of an open descriptor, /proc/self/fd/N, leads to the file that was read. Without
/proc the bytes are written again, into a folder of this process.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import threading
from pathlib import Path

from ..paths import trusted_path

_lock = threading.Lock()
_names: dict[str, Path] = {}
"""By digest. The descriptors stay open: the loader takes a name that it knows for the library
that had it first, and a library is asked for by its name again."""


def loadable(handle: int, data: bytes, digest: str) -> Path:
    """A name for the loader that is good as long as this process.

    Args:
        handle: the open file, which nobody else may write to.
        data: what was read from it.
        digest: the SHA-256 of that.

    Raises:
        OSError: when there is none to be had.
    """
    with _lock:
        if digest not in _names:
            _names[digest] = _by_descriptor(handle) or _by_copy(data)
        return _names[digest]


def _by_descriptor(handle: int) -> Path | None:
    spare = []
    try:
        spare.append(os.dup(handle))
        # A number comes again where somebody closed a descriptor that was not theirs.
        while (name := Path(f"/proc/self/fd/{spare[-1]}")) in _names.values():
            spare.append(os.dup(handle))
        if not os.path.samestat(os.stat(name), os.fstat(handle)):
            return None
        spare.pop()
        return name
    except OSError:  # no /proc, or too many files are open
        return None
    finally:
        for each in spare:
            os.close(each)


def _by_copy(data: bytes) -> Path:
    handle, name = tempfile.mkstemp(suffix=".so", dir=_copies())
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return Path(name)


@functools.cache
def _copies() -> Path:
    """A folder of this process alone, which is removed at its end."""
    folder = tempfile.mkdtemp(prefix="splitpoint-")
    maker = os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # and not a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return trusted_path(Path(folder), "the temporary folder")
