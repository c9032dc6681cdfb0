"""A folder of entries and the files that they refer to, safe to share and to interrupt.

    <folder>/<kind>/<first two digits>/<key>.json    entries: a SHA-256, a newline, JSON
    <folder>/objects/<first two digits>/<SHA-256>    files that entries refer to, by content
    <folder>/aside/                                  what was found damaged
    <folder>/locks/                                  one file a key

What is in a file is hashed each time that it is read, so damage of any kind is a miss; so is a
link, and whatever others may write to (`folder`). Libraries are loaded as they were hashed
(`loadable`), and files mapped (`Store.mapped`). Files appear under their names by a rename, whole
or not at all, and are never written to after it. Nothing here raises because a disk is full or a
folder cannot be written: what cannot be kept is made again next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import UntrustedStore
from ..kernels.memory import mapped_file
from .folder import Damaged, Folder, content
from .loadable import loadable
from .lock import locked

log = logging.getLogger("splitpoint")

Read = TypeVar("Read")
Buffer = bytes | memoryview

OBJECTS, ASIDE, LOCKS = "objects", "aside", "locks"
KINDS = ("models", "pieces", "weights")
"""The kinds of entries."""

ENTRY = re.compile(
    r"(?P<kind>[a-z]+)/(?P<head>[0-9a-f]{2})/(?P<name>[0-9a-f]{64}(-[0-9a-f]{8})?)\.json"
)
OBJECT = re.compile(r"objects/(?P<head>[0-9a-f]{2})/(?P<name>[0-9a-f]{64})")

_MAPPED = 0o400
"""The mode of what is mapped: to write to it, instead of putting another in its place, would change
values under whoever reads them."""

OTHER_CONTENT = "does not have the content that its name says"

LOCK_TIMEOUT_S = 600.0
"""How long a process waits for another that compiles the same; then it compiles too."""

YOUNG_S = 3600.0
"""A file that nothing refers to is not removed before this age: an entry may be on its way."""


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it should be."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class Store:
    """Entries by kind and key, and objects by content.

    Args:
        folder: made when something is first written.
        lock_timeout_s: how long to wait for another process that holds a lock.
        step: called with a name before each step of a write, and between the check of a library
            and its use; for tests that interrupt there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self._inside = Folder(folder, "the store")
        self.lock_timeout_s = lock_timeout_s
        self._step = step
        self._warned: set[str] = set()

    # --- trust -------------------------------------------------------------------------

    def check_trust(self) -> None:
        """Check that nobody else can have put anything here. A folder that is not there yet
        is fine if the way to it is.

        Raises:
            UntrustedStore: when the folder, or something on the way to it, is another user's or
                others may write to it.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._inside.prove()

    @staticmethod
    def digest(data: bytes) -> str:
        """The name of an object with this content."""
        return hashlib.sha256(data).hexdigest()

    # --- reading -----------------------------------------------------------------------

    def entry_path(self, kind: str, key: str) -> Path:
        """Where an entry is."""
        return self.folder / kind / key[:2] / f"{key}.json"

    def object_path(self, digest: str) -> Path:
        """Where an object is."""
        return self.folder / OBJECTS / digest[:2] / digest

    def read(self, kind: str, key: str, use: bool = True) -> dict[str, Any] | None:
        """An entry, or None. A damaged one is reported and set aside. Unless it is not for
        `use`, it will be pruned after those used before."""

        def entry(handle: int) -> dict[str, Any]:
            found = decode_entry(content(handle), kind, key)
            if use:
                with contextlib.suppress(OSError):
                    os.utime(handle)
            return found

        return self._read(self.entry_path(kind, key), entry)

    def keys(self, kind: str, prefix: str = "") -> list[str]:
        """The keys of a kind that start with a prefix, latest first."""
        found = []
        for path in self._paths(kind, prefix[:2]):
            if path.suffix == ".json" and path.stem.startswith(prefix):
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_mtime_ns, path.stem))
        return [key for _, key in sorted(found, reverse=True)]

    def object(self, digest: str) -> bytes | None:
        """The content of an object, or None. A damaged one is reported and set aside."""
        return self._read(self.object_path(digest), lambda handle: _object(handle, digest))

    def library(self, digest: str) -> Path | None:
        """A name under which the loader finds the content of an object as it was checked just
        now, as long as this process runs; None as `object`."""

        def library(handle: int) -> Path:
            data = _object(handle, digest)
            self._step("checked")
            return loadable(handle, data, digest)

        return self._read(self.object_path(digest), library)

    def mapped(self, digest: str) -> mmap.mmap | None:
        """The content of an object as it was checked just now, as memory whose pages all
        processes share that map it, but for those that they write to, which become their own;
        None as `object`."""

        def mapped(handle: int) -> mmap.mmap:
            try:
                memory = mapped_file(handle)
            except OSError as error:
                raise Damaged(f"cannot be mapped ({error.strerror})") from error
            except ValueError as error:  # it is empty
                raise Damaged(OTHER_CONTENT) from error
            if hashlib.sha256(memory).hexdigest() != digest:
                raise Damaged(OTHER_CONTENT)
            return memory

        return self._read(self.object_path(digest), mapped)

    def _read(self, path: Path, read: Callable[[int], Read]) -> Read | None:
        """What is read from a file's descriptor; None where it is not there, or not to be used,
        which is said."""
        try:
            with self._inside.file(*self._parts(path)) as handle:
                return read(handle)
        except FileNotFoundError:
            return None
        except Damaged as problem:
            self.set_aside(problem.path or path, str(problem))
        except OSError as error:
            self._refused(error, f"cannot read {path}")
        return None

    def _parts(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.folder).parts

    def _refused(self, error: Exception, what: str, then: str = "") -> None:
        """Warn that something could not be done, for the same reason once."""
        trusted = not isinstance(error, UntrustedStore)
        reason = _reason(error)
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning(
                "store: %s", f"{what} ({reason}){then}" if trusted else f"not used: {reason}"
            )

    def set_aside(self, path: Path, why: str) -> None:
        """Report a file or folder in one line, and move it out of the way if possible."""
        log.warning("store: %s %s; it is not used", path, why)
        *above, name = self._parts(path)
        with (
            contextlib.suppress(OSError, Damaged),
            self._inside.opened(*above) as source,
            self._inside.opened(ASIDE, make=True) as aside,
        ):
            there = f"{name}-{time.time_ns():x}"
            os.replace(name, there, src_dir_fd=source, dst_dir_fd=aside)

    # --- writing -----------------------------------------------------------------------

    def write(self, kind: str, key: str, entry: dict[str, Any]) -> bool:
        """Keep an entry; False, with one line in the log, when that is not possible."""
        text = json.dumps({**entry, "kind": kind, "key": key}, sort_keys=True)
        data = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode()
        return self._write_file(self.entry_path(kind, key), data)

    def write_object(self, data: bytes) -> str | None:
        """Keep some bytes and return their digest; None when that is not possible."""
        digest = self.digest(data)
        if self.object(digest) is not None or self._write_file(self.object_path(digest), data):
            return digest
        return None

    def write_stream(self, parts: Iterable[Buffer]) -> str | None:
        """Keep what comes part by part, each good until the next is asked for, as one object that
        may be mapped; otherwise as `write_object`. Nothing is asked for where nothing can be
        written."""
        hashed = hashlib.sha256()

        def fill(file: BinaryIO) -> Path:
            for part in parts:
                hashed.update(part)
                file.write(part)
                file.flush()
                self._step("part")
            return self.object_path(hashed.hexdigest())

        # Where it will lie is known at its end only.
        head = os.urandom(1).hex()
        kept = self._write([OBJECTS, head], fill, _MAPPED)
        return hashed.hexdigest() if kept else None

    def _write_file(self, path: Path, data: bytes) -> bool:
        def fill(file: BinaryIO) -> Path:
            file.write(data[: len(data) // 2])
            file.flush()
            self._step("half")
            file.write(data[len(data) // 2 :])
            file.flush()
            return path

        return self._write(self._parts(path)[:-1], fill)

    def _write(
        self, above: Sequence[str], fill: Callable[[BinaryIO], Path], mode: int = 0o600
    ) -> bool:
        """Write a file, begun in a folder, with what `fill` does, to the path that it returns."""
        temporary = f"tmp-{os.getpid()}-{os.urandom(6).hex()}"
        try:
            self._step("folder")
            with self._made(*above) as folder:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    handle = os.open(temporary, flags, mode, dir_fd=folder)
                    with os.fdopen(handle, "wb") as file:
                        self._step("created")
                        path = fill(file)
                        self._step("written")
                        os.fsync(file.fileno())
                    self._step("synced")
                    *into, name = self._parts(path)
                    with self._made(*into) as end:
                        if mode == _MAPPED and os.access(name, os.F_OK, dir_fd=end):
                            os.unlink(temporary, dir_fd=folder)  # others share the one there
                        else:
                            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=end)
                    self._step("renamed")
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=folder)
                    raise
        except (OSError, Damaged) as error:
            what = f"cannot write to {self.folder}"
            self._refused(error, what, "; what is made now is made again next time")
            return False
        return True

    @contextlib.contextmanager
    def _made(self, *names: str) -> Iterator[int]:
        """A folder to write in; what must not be used in its place is set aside first."""
        try:
            with self._inside.opened(*names, make=True):
                pass
        except Damaged as problem:
            self.set_aside(problem.path or self.folder, str(problem))
        with self._inside.opened(*names, make=True) as folder:
            yield folder

    @contextlib.contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a key; False where there is none, or the wait took too long. If not
        to `wait`, False also while another process holds it.

        A lock falls when its holder ends, however it ends; the next process then takes over.
        """
        path = self.folder / LOCKS / f"{key}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with self._made(LOCKS) as folder:
                handle = os.open(path.name, flags, 0o600, dir_fd=folder)
        except (OSError, Damaged):
            yield False
            return
        with os.fdopen(handle, "r"):
            yield locked(handle, path, self.lock_timeout_s if wait else None)

    # --- the whole ---------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[str, str, Path]]:
        """(kind, key, path) of every entry."""
        for kind in KINDS:
            for path in self._paths(kind):
                if path.suffix == ".json":
                    yield kind, path.stem, path

    def objects(self) -> Iterator[Path]:
        """The path of every object."""
        for path in self._paths(OBJECTS):
            if OBJECT.fullmatch(path.relative_to(self.folder).as_posix()):
                yield path

    def _paths(
        self, top: str, head: str = "", problems: list[Problem] | None = None
    ) -> Iterator[Path]:
        """The path of everything in the folders of two digits, or in one of them, in order; adds
        which cannot be used to `problems`."""

        def names(*inside: str) -> list[str]:
            try:
                return self._inside.names(*inside)
            except FileNotFoundError:
                pass
            except (OSError, Damaged) as error:
                if problems is not None:
                    path = self.folder.joinpath(*inside)
                    problems.append(Problem(path, _reason(error)))
            return []

        for each in [head] if head else names(top):
            if len(each) == 2:
                for name in names(top, each):
                    yield self.folder / top / each / name

    def content(self, path: Path) -> bytes:
        """The bytes of an entry or object, if they are those that were written.

        Raises:
            FileNotFoundError: when it is not there.
            Damaged: when it must not be used.
        """
        kind = self._parts(path)[0]
        with self._inside.file(*self._parts(path)) as handle:
            if kind == OBJECTS:
                return _object(handle, path.name)
            data = content(handle)
        decode_entry(data, kind, path.stem)
        return data

    def verify(self) -> list[Problem]:
        """Read everything; say what is damaged or missing. Changes nothing."""
        problems: list[Problem] = []
        good: set[str] = set()
        for top in (OBJECTS, *KINDS):
            for _ in self._paths(top, problems=problems):
                pass
        for path in self.objects():
            try:
                self.content(path)
                good.add(path.name)
            except (Damaged, OSError) as problem:
                problems.append(Problem(path, _reason(problem)))
        for kind, key, path in self.entries():
            try:
                entry = decode_entry(self.content(path), kind, key)
            except (Damaged, OSError) as problem:
                problems.append(Problem(path, _reason(problem)))
                continue
            problems += [
                Problem(path, f"refers to {digest}, which is not there or damaged")
                for digest in entry.get("objects", ())
                if digest not in good
            ]
        return problems

    def prune(self, max_bytes: int) -> tuple[int, int]:
        """Remove the entries used longest ago until the rest, with the objects it refers to,
        takes at most `max_bytes`; then everything that nothing refers to.

        Returns:
            Files removed, and their bytes.
        """
        found = []
        for kind, key, path in self.entries():
            try:
                entry = decode_entry(self.content(path), kind, key)
                needs = set(entry.get("objects", ()))
            except (Damaged, OSError):
                needs = set()
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime_ns, path, path.stat().st_size, needs))
        sizes = {path.name: path.stat().st_size for path in self.objects()}
        kept: set[str] = set()
        total = removed = freed = 0

        def remove(path: Path, size: int) -> None:
            nonlocal removed, freed
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
                freed += size

        full = False
        for _, path, size, needs in sorted(found, key=lambda each: each[0], reverse=True):
            cost = size + sum(sizes.get(digest, 0) for digest in needs - kept)
            full = full or total + cost > max_bytes
            if full:
                remove(path, size)
                continue
            total += cost
            kept |= needs
        old = time.time() - YOUNG_S
        for path in self.objects():
            if path.name not in kept and (full or path.stat().st_mtime < old):
                remove(path, sizes[path.name])
        unfinished = [
            path
            for top in (OBJECTS, *KINDS)
            for path in self._paths(top)
            if path.name.startswith("tmp-")
        ]
        with contextlib.suppress(OSError, Damaged):
            unfinished += [self.folder / ASIDE / name for name in self._inside.names(ASIDE)]
        for path in unfinished:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old or path.parent.name == ASIDE:
                    remove(path, path.stat().st_size)
        return removed, freed


def _object(handle: int, digest: str) -> bytes:
    """The content of an object.

    Raises:
        Damaged: when it is not what its name says.
    """
    data = content(handle)
    if hashlib.sha256(data).hexdigest() != digest:
        raise Damaged(OTHER_CONTENT)
    return data


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def decode_entry(data: bytes, kind: str, key: str) -> dict[str, Any]:
    """The entry in the bytes of its file.

    Raises:
        Damaged: when the bytes are not those that were written for this kind and key.
    """
    digest, _, text = data.partition(b"\n")
    if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest().encode() != digest:
        raise Damaged("is damaged: its content does not have the hash in its first line")
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise Damaged(f"is not JSON: {error}") from error
    if not isinstance(entry, dict) or entry.get("kind") != kind or entry.get("key") != key:
        raise Damaged("is the entry of another key")
    return entry
