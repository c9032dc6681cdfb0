"""Where files that outlive a run are kept, and whether others could exchange them."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import sys
from pathlib import Path

from .errors import UntrustedStore


def cache_folder() -> Path:
    """The folder for files that can be made again: `SPLITPOINT_CACHE`, or the platform's own.

    The platform's own is `$XDG_CACHE_HOME/splitpoint` (`~/.cache/splitpoint` when unset),
    `~/Library/Caches/splitpoint` on macOS and `%LOCALAPPDATA%\\splitpoint` on Windows. The
    folder need not exist yet.
    """
    if given := os.environ.get("SPLITPOINT_CACHE"):
        return Path(given).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "splitpoint"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "splitpoint"
        )
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification asks that a relative path be ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "splitpoint"


def store_folder() -> Path:
    """The folder of compiled artifacts, unless a `Config` names another."""
    return cache_folder() / "store"


def make_folder(folder: Path) -> None:
    """Make a folder, and what is missing on the way to it, as `trusted_path` does where that
    matters: with a umask of 002 it may refuse later what is made otherwise.

    Raises:
        OSError: when that is not possible.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(_ON_THE_WAY, exist_ok=True)


# --- trust -----------------------------------------------------------------------------

_ON_THE_WAY = 0o755
"""The mode of folders that are made on the way to another: as the umask says, but for writing."""

_MOST_LINKS = 40
"""As many as Linux follows."""


def trusted_path(folder: Path, what: str, make: int | None = None) -> Path:
    """The path of a folder without links, proven to lead where the user and root alone decide.

    From the root down, each folder and each link must belong to the user or root, and nobody else
    may write to a folder. On the way two may be open to others: a sticky folder, as /tmp is, where
    nobody can rename or remove what is not theirs, and one that a group may write to which is the
    user's alone. What is above is proven before what is below is looked at, so nobody else can
    exchange it meanwhile.

    Args:
        folder: links on the way to it are followed.
        what: what it is to a reader of the message.
        make: the mode to make it with where it is not there, after a proof of what is there of
            the way to it; None not to.

    Raises:
        FileNotFoundError: when it is not there; what is there of the way to it is proven.
        OSError: when it cannot be there, or cannot be made.
        UntrustedStore: when there is no such proof.
    """

    def refused(problem: str, remedy: str) -> UntrustedStore:
        return UntrustedStore(
            f"{what} {folder} is not safe to run code from: {problem}\n"
            "expected: all on the way to it belongs to you or root, and nobody else may write "
            "there, sticky folders such as /tmp aside\n"
            f"{remedy}, or name another folder (cache_dir, SPLITPOINT_CACHE)"
        )

    def look_at(path: str) -> os.stat_result:
        try:
            return os.lstat(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            problem = f"{path} cannot be read ({error.strerror})"
            raise refused(problem, "make it readable") from error

    at, links = "/", 0
    rest = list(reversed(folder.absolute().parts[1:]))
    while True:
        found = look_at(at)
        if not stat.S_ISDIR(found.st_mode):
            if rest:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), at)
            raise refused(f"{at} is not a folder", "remove the file")
        if (problem := foreign(found)) and not (rest and _may_be_open(at, found)):
            if not rest:
                remedy = "remove it, or chown -R and chmod -R go-w it if you trust what is in it"
            else:
                remedy = f"chmod go-w {at}" if _is_own(found) else f"have {at} given to you"
            raise refused(f"{at} {problem}", remedy)
        if not rest:
            return Path(at)
        name = rest.pop()
        if name == "..":
            at = os.path.dirname(at)  # there is no link in it
            continue
        there = os.path.join(at, name)
        try:
            found = look_at(there)
        except FileNotFoundError:
            if make is None:
                raise
            with contextlib.suppress(FileExistsError):
                os.mkdir(there, _ON_THE_WAY if rest else make)
            found = look_at(there)
        if not stat.S_ISLNK(found.st_mode):
            at = there
            continue
        links += 1
        if not _is_own(found) or links > _MOST_LINKS:
            problem = "is one link too many" if _is_own(found) else foreign(found)
            raise refused(f"the link {there} {problem}", "name the folder that it leads to")
        target = Path(os.readlink(there))
        at = "/" if target.is_absolute() else at
        rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def foreign(found: os.stat_result) -> str:
    """Why somebody else may have written a file or folder, or ""."""
    if not _is_own(found):
        return f"belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0)


def _may_be_open(path: str, found: os.stat_result) -> bool:
    """Whether a folder that others may write to may be on the way to one that they may not."""
    if not _is_own(found):
        return False
    if found.st_mode & stat.S_ISVTX:
        return True
    if found.st_mode & stat.S_IWOTH or not _is_own_group(found.st_gid, os.geteuid()):
        return False
    # With an access control list the mode says how much is granted, not to whom.
    return sys.platform == "linux" and "system.posix_acl_access" not in os.listxattr(path)


@functools.cache
def _is_own_group(group: int, user: int) -> bool:
    """Whether a group is that of one user alone, as systems with a umask of 002 make for each."""
    import grp
    import pwd

    try:
        who, which = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    # Not every system lists all of its users: the name is what says that a group was made for one.
    return (
        group != 0
        and (who.pw_gid, who.pw_name) == (group, which.gr_name)
        and set(which.gr_mem) <= {who.pw_name}
        and all(each.pw_uid == user for each in pwd.getpwall() if each.pw_gid == group)
    )
