"""A folder whose files are reached through descriptors: no link in it is followed.

What was looked at is then what is read, whatever happens to its name meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..paths import foreign, trusted_path

_NO_LINKS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_READ = _NO_LINKS | getattr(os, "O_NONBLOCK", 0)
_LIST = _NO_LINKS | getattr(os, "O_DIRECTORY", 0)
_PASS = _LIST | getattr(os, "O_PATH", 0)
"""Opens a folder that may be passed through, if not listed."""


class Damaged(Exception):
    """A file or folder that must not be used; says why.

    Args:
        why: what is wrong with it.
        path: where it is; None where whoever asked knows.
    """

    def __init__(self, why: str, path: Path | None = None) -> None:
        super().__init__(why)
        self.path = path


class Folder:
    """A folder that the user and root alone may write to, and what is in it.

    Each method proves that first, and raises `UntrustedStore` where it cannot.

    Args:
        path: links on the way to it are followed where they can be trusted.
        what: what it is to a reader of messages.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what

    def prove(self, make: bool = False) -> Path:
        """Its path without links, as `trusted_path`."""
        return trusted_path(self.path, self.what, 0o700 if make else None)

    @contextlib.contextmanager
    def opened(self, *names: str, make: bool = False) -> Iterator[int]:
        """A descriptor, for `dir_fd`, of the folder that some names lead to, each inside the one
        before.

        Args:
            names: none for the folder itself.
            make: whether to make what is missing.

        Raises:
            FileNotFoundError: when one is not there.
            Damaged: when one is a link, no folder, or others may write to it.
            OSError: when one cannot be opened or made.
        """
        handle = os.open(self.prove(make), _PASS)
        try:
            path = self.path
            for name in names:
                path = path / name
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=handle)
                try:
                    inner = os.open(name, _PASS, dir_fd=handle)
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP):
                        raise Damaged("is a link or no folder", path) from error
                    raise
                os.close(handle)
                handle = inner
                if problem := foreign(os.fstat(handle)):
                    raise Damaged(problem, path)
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def file(self, *names: str) -> Iterator[int]:
        """A descriptor, to read from, of a plain file that nobody else can have written.

        Raises:
            FileNotFoundError: when there is none.
            Damaged: when it is not to be trusted or cannot be read.
            OSError: as `opened`, or when too many files are open.
        """
        with self.opened(*names[:-1]) as folder:
            try:
                handle = os.open(names[-1], _READ, dir_fd=folder)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EMFILE, errno.ENFILE):
                    raise
                link = error.errno == errno.ELOOP
                why = "is a link" if link else f"cannot be read ({error.strerror})"
                raise Damaged(why) from error
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise Damaged("is not a plain file")
            if problem := foreign(found):
                raise Damaged(problem)
            yield handle
        finally:
            os.close(handle)

    def names(self, *names: str) -> list[str]:
        """What is in a folder, in order.

        Raises:
            FileNotFoundError, Damaged, OSError: as `opened`.
        """
        with self.opened(*names) as folder:
            handle = os.open(".", _LIST, dir_fd=folder)
            try:
                return sorted(os.listdir(handle))
            finally:
                os.close(handle)


def content(handle: int) -> bytes:
    """All bytes of a file.

    Raises:
        Damaged: when they cannot be read.
    """
    try:
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from error
