"""Runs a command, and ends all of its processes when it or the caller ends, however that comes.

    python -I guard.py SECONDS COMMAND ...

with a pipe as standard input, which the caller holds open. Whether the caller closes it, is
interrupted or killed: the pipe ends, and then so do the command's processes, those that left their
group or lost their parent included (Linux); after SIGTERM they have so many SECONDS to do so by
themselves. The shared memory that they made is removed: what they have mapped or open of /dev/shm
that was not there before, and nobody else has. A line in the pipe has it noted then, for processes
that are killed later. The exit code is the command's, or 128 and the number of the signal that
ended it.

It imports neither torch nor this package: nothing slow or large stands beside what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHARED = "/dev/shm/"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(grace_s: float, command: list[str]) -> int:
    """Run a command until it ends or standard input does."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process
    before = set(os.listdir(SHARED)) if os.path.isdir(SHARED) else set()
    # What interrupts the caller closes the pipe; this process must outlive it.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_as_child,
    )
    files: set[str] = set()
    while child.poll() is None:
        if select.select([0], [], [], 0.05)[0]:
            if not os.read(0, 1024):
                break
            files |= shared_files(descendants())
    files |= shared_files(descendants())
    end(child, grace_s)
    for path in files - shared_files(_all_processes()):
        folder, _, name = path.rpartition("/")
        if f"{folder}/" == SHARED and name not in before:
            with contextlib.suppress(OSError):
                os.unlink(path)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _as_child() -> None:
    for number in SIGNALS:  # what is ignored here would be there too
        signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # in case this process is killed


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a child and all its processes: first ask, then kill."""
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    while _alive(child):
        _signal_group(child.pid, signal.SIGKILL)
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _alive(child: subprocess.Popen[bytes]) -> bool:
    """Whether anything that was started still runs; collects what ended."""
    child.poll()
    for pid in descendants():
        if pid != child.pid:
            with contextlib.suppress(ChildProcessError):  # it is not a child, but one's child
                os.waitpid(pid, os.WNOHANG)
    return child.poll() is None or bool(descendants())


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def descendants() -> list[int]:
    """The processes below this one; none where there is no /proc."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(each) for each in task.read_text().split()]
                found += children
                waiting += children
    return found


def shared_files(pids: Iterable[int]) -> set[str]:
    """The files in /dev/shm that processes have mapped or open."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                found.add(line[line.find("/") :] if SHARED in line else "")
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(link))
    return {name for name in found if name.startswith(SHARED) and not name.endswith(" (deleted)")}


def _all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
