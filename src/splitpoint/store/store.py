"""A folder of entries and the files that they refer to, safe to share and to interrupt.

    <folder>/<kind>/<first two digits>/<key>.json    entries: a SHA-256, a newline, JSON
    <folder>/objects/<first two digits>/<SHA-256>    files that entries refer to, by content
    <folder>/aside/                                  what was found damaged
    <folder>/locks/                                  one file a key

What is in a file is hashed each time that it is read, so damage of any kind is a miss. Files
appear under their names by a rename, whole or not at all. Nothing here raises because a disk
is full or a folder cannot be written: what cannot be kept is compiled again next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UntrustedStore

log = logging.getLogger("splitpoint")

OBJECTS, ASIDE, LOCKS = "objects", "aside", "locks"
KINDS = ("models", "pieces")
"""The kinds of entries."""

ENTRY = re.compile(
    r"(?P<kind>[a-z]+)/(?P<head>[0-9a-f]{2})/(?P<name>[0-9a-f]{64}(-[0-9a-f]{8})?)\.json"
)
OBJECT = re.compile(r"objects/(?P<head>[0-9a-f]{2})/(?P<name>[0-9a-f]{64})")

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


class Damaged(Exception):
    """A file that must not be used; says why."""


class Store:
    """Entries by kind and key, and objects by content.

    Args:
        folder: made when something is first written.
        lock_timeout_s: how long to wait for another process that holds a lock.
        step: called with a name before each step of a write; for tests that interrupt there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.lock_timeout_s = lock_timeout_s
        self._step = step
        self._warned: set[str] = set()

    # --- trust -------------------------------------------------------------------------

    def check_trust(self) -> None:
        """Check that nobody else can have put anything here. A folder that is not there yet
        is fine.

        Raises:
            UntrustedStore: when the folder is another user's, or others may write to it.
        """
        try:
            found = os.stat(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UntrustedStore(f"the store {self.folder} cannot be read: {error}") from error
        if not stat.S_ISDIR(found.st_mode):
            raise UntrustedStore(f"the store {self.folder} is not a folder: remove the file")
        if problem := _foreign(found):
            raise UntrustedStore(
                f"the store {self.folder} {problem}, and code is run from it: take it over with "
                f"chown -R and chmod -R go-w if you trust what is in it, or set another cache_dir"
            )

    def _read_file(self, path: Path) -> bytes:
        """The bytes of a file that nobody else can have written.

        Raises:
            FileNotFoundError: when there is none.
            Damaged: when it is not to be trusted or cannot be read.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(str(path)) from error
        except OSError as error:
            raise Damaged(f"cannot be read ({error.strerror})") from error
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise Damaged("is not a plain file")
            if problem := _foreign(found):
                raise Damaged(problem)
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            raise Damaged(f"cannot be read ({error.strerror})") from error
        finally:
            os.close(handle)

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
        path = self.entry_path(kind, key)
        try:
            found = decode_entry(self._read_file(path), kind, key)
        except FileNotFoundError:
            return None
        except Damaged as problem:
            self.set_aside(path, str(problem))
            return None
        if use:
            with contextlib.suppress(OSError):
                os.utime(path)
        return found

    def keys(self, kind: str, prefix: str = "") -> list[str]:
        """The keys of a kind that start with a prefix, latest first."""
        pattern = f"{prefix[:2] or '??'}/{prefix}*.json"
        found = []
        for path in (self.folder / kind).glob(pattern):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime_ns, path.stem))
        return [key for _, key in sorted(found, reverse=True)]

    def object(self, digest: str) -> Path | None:
        """The path of an object whose content was checked just now, or None. A damaged one is
        reported and set aside."""
        path = self.object_path(digest)
        try:
            if hashlib.sha256(self._read_file(path)).hexdigest() != digest:
                raise Damaged("does not have the content that its name says")
        except FileNotFoundError:
            return None
        except Damaged as problem:
            self.set_aside(path, str(problem))
            return None
        return path

    def set_aside(self, path: Path, why: str) -> None:
        """Report a file in one line, and move it out of the way if possible."""
        log.warning("store: %s %s; it is not used", path, why)
        with contextlib.suppress(OSError):
            aside = self.folder / ASIDE
            aside.mkdir(mode=0o700, exist_ok=True)
            os.replace(path, aside / f"{path.name}-{time.time_ns():x}")

    # --- writing -----------------------------------------------------------------------

    def write(self, kind: str, key: str, entry: dict[str, Any]) -> bool:
        """Keep an entry; False, with one line in the log, when that is not possible."""
        text = json.dumps({**entry, "kind": kind, "key": key}, sort_keys=True)
        data = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode()
        return self._write_file(self.entry_path(kind, key), data)

    def write_object(self, data: bytes) -> str | None:
        """Keep some bytes and return their digest; None when that is not possible."""
        digest = self.digest(data)
        path = self.object_path(digest)
        if path.exists() and self.object(digest) is not None:
            return digest
        return digest if self._write_file(path, data) else None

    def _write_file(self, path: Path, data: bytes) -> bool:
        temporary = path.with_name(f"tmp-{os.getpid()}-{os.urandom(6).hex()}")
        try:
            self._step("folder")
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.parent.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    self._step("created")
                    file.write(data[: len(data) // 2])
                    file.flush()
                    self._step("half")
                    file.write(data[len(data) // 2 :])
                    file.flush()
                    self._step("written")
                    os.fsync(file.fileno())
                self._step("synced")
                os.replace(temporary, path)
                self._step("renamed")
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            if str(error.strerror) not in self._warned:
                self._warned.add(str(error.strerror))
                log.warning(
                    "store: cannot write to %s (%s); what is compiled now is compiled again next "
                    "time",
                    self.folder,
                    error.strerror,
                )
            return False
        return True

    @contextlib.contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a key; False where there is none, or the wait took too long. If not
        to `wait`, False also while another process holds it.

        A lock falls when its holder ends, however it ends; the next process then takes over.
        """
        import fcntl

        path = self.folder / LOCKS / f"{key}.lock"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield False
            return
        with os.fdopen(handle, "r"):
            end = time.monotonic() + self.lock_timeout_s
            pause = 0.002
            held = False
            while not held:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                except BlockingIOError:
                    if not wait:
                        break
                    if time.monotonic() >= end:
                        log.warning(
                            "store: another process has held %s for %.0f s; this one goes on "
                            "without waiting for it",
                            path,
                            self.lock_timeout_s,
                        )
                        break
                    time.sleep(pause)
                    pause = min(2 * pause, 0.1)
                except OSError:
                    break  # a file system without locks
            yield held

    # --- the whole ---------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[str, str, Path]]:
        """(kind, key, path) of every entry."""
        for kind in KINDS:
            for path in sorted((self.folder / kind).glob("??/*.json")):
                yield kind, path.stem, path

    def objects(self) -> Iterator[Path]:
        """The path of every object."""
        yield from sorted((self.folder / OBJECTS).glob("??/" + "[0-9a-f]" * 64))

    def verify(self) -> list[Problem]:
        """Read everything; say what is damaged or missing. Changes nothing."""
        problems: list[Problem] = []
        good: set[str] = set()
        for path in self.objects():
            try:
                if hashlib.sha256(self._read_file(path)).hexdigest() != path.name:
                    raise Damaged("does not have the content that its name says")
                good.add(path.name)
            except (Damaged, FileNotFoundError) as problem:
                problems.append(Problem(path, str(problem)))
        for kind, key, path in self.entries():
            try:
                entry = decode_entry(self._read_file(path), kind, key)
            except (Damaged, FileNotFoundError) as problem:
                problems.append(Problem(path, str(problem)))
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
                entry = decode_entry(self._read_file(path), kind, key)
                needs = set(entry.get("objects", ()))
            except (Damaged, FileNotFoundError):
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
        for path in [*self.folder.glob("*/??/tmp-*"), *self.folder.glob(f"{ASIDE}/*")]:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old or path.parent.name == ASIDE:
                    remove(path, path.stat().st_size)
        return removed, freed


def _foreign(found: os.stat_result) -> str:
    """Why somebody else may have written a file or folder, or ""."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


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
