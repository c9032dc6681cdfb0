"""A server in processes of its own, which end when the benchmark does."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ..errors import ServerFailed
from . import guard

HOST = "127.0.0.1"
GUARD = Path(guard.__file__)


def free_port() -> int:
    """A port of this machine's own address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """Started when made, behind `guard`; `with` closes it.

    Args:
        command: of the server, which listens on `HOST` and `port`.
        port: that it was told.
        env: its environment, whole.
        log: where its output goes.
        grace_s: what its processes have for ending by themselves.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        env: Mapping[str, str],
        log: Path,
        grace_s: float = 10.0,
    ) -> None:
        self.port = port
        self.log = log
        self._started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(GUARD), str(grace_s), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=dict(env),
                start_new_session=True,  # Ctrl-C is for this process, which then closes
            )

    def wait(self, timeout_s: float, path: str = "/health") -> float:
        """Wait until a GET of `path` is answered by 200; the seconds since the start.

        Raises:
            ServerFailed: when it ends, or does not answer in time.
        """
        while time.perf_counter() - self._started < timeout_s:
            if self._process.poll() is not None:
                raise ServerFailed(
                    f"the server ended with {self._process.returncode}{self.reason()}"
                )
            if self._answers(path):
                seconds = time.perf_counter() - self._started
                self._note()
                return seconds
            time.sleep(0.05)
        raise ServerFailed(f"the server did not answer within {timeout_s:g} s{self.reason()}")

    def _answers(self, path: str) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _note(self) -> None:
        """Have the guard note the shared memory that is in use."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def lines(self) -> list[str]:
        """What it has written so far."""
        return self.log.read_text(errors="replace").splitlines()

    def reason(self) -> str:
        """The first line that names an error, or the last one, as the end of a message: what
        follows the first are often processes that miss the one that failed."""
        lines = [line.strip() for line in self.lines() if line.strip()]
        named = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
        said = (named or lines[-1:] or ["it said nothing"])[0]
        return f": {said[:300]} (all of it: {self.log})"

    def close(self) -> None:
        """End it and all its processes; an interrupt meanwhile is raised once they have ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        interrupt = None
        while self._process.returncode is None:
            try:
                self._process.wait()  # no longer than the grace and a little
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
