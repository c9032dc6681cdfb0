"""What was started ends: real processes in groups of their own, killed in every way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitpoint.bench.server import Server, free_port
from splitpoint.errors import ServerFailed

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="what is looked for is in /proc"),
]

ROOT = Path(__file__).parents[2]

TREE = """if True:
    # A server with a child in a session of its own that will not be asked to end, and the child's
    # orphan; each has a file in /dev/shm mapped.
    import http.server, mmap, os, signal, subprocess, sys
    port, folder, answers = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    def note(name):
        path = f"/dev/shm/splitpoint-test-{os.getpid()}"
        file = open(path, "w+b")
        file.truncate(4096)
        kept.append(mmap.mmap(file.fileno(), 4096))
        file.close()
        with open(f"{folder}/{name}.tmp", "w") as log:
            log.write(f"{os.getpid()} {path}")
        os.rename(f"{folder}/{name}.tmp", f"{folder}/{name}")
    kept = []
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            if os.fork() != 0:
                os._exit(0)  # what comes is an orphan
            note("orphan")
        else:
            note("child")
        while True:
            signal.pause()
    note("server")
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if answers == "yes" else 503)
            self.end_headers()
        def log_message(self, *args): pass
    print("RuntimeError: said before", flush=True)
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def server(folder: Path, answers: str = "yes", grace_s: float = 0.5) -> Server:
    port = free_port()
    command = [sys.executable, "-c", TREE, str(port), str(folder), answers]
    return Server(command, port, os.environ, folder / "log", grace_s)


def started(folder: Path) -> dict[str, tuple[int, Path]]:
    """Process and shared memory of each part of the tree, once all are there."""
    deadline = time.monotonic() + 60
    names = ("server", "child", "orphan")
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)
    found = {}
    for name in names:
        pid, path = (folder / name).read_text().split()
        found[name] = (int(pid), Path(path))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def left(tree: dict[str, tuple[int, Path]]) -> list[str]:
    """What is still there of a tree."""
    found = [name for name, (pid, _) in tree.items() if is_alive(pid)]
    return found + [str(path) for _, path in tree.values() if path.exists()]


def ends(tree: dict[str, tuple[int, Path]]) -> bool:
    deadline = time.monotonic() + 60
    while left(tree) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left(tree)


def test_closing_ends_all_of_it(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        assert running.wait(60) > 0
        tree = started(tmp_path)
        assert len(left(tree)) == 6
    assert left(tree) == []


def test_a_server_that_was_killed_is_said_and_takes_the_rest_along(tmp_path: Path) -> None:
    with server(tmp_path, "no") as running:
        tree = started(tmp_path)
        os.kill(tree["server"][0], signal.SIGKILL)
        with pytest.raises(ServerFailed, match="ended with 137: RuntimeError: said before"):
            running.wait(60)
        del tree["server"]  # its file was noted nowhere: it never answered
        assert left(tree) == []
    (tmp_path / "server").read_text()
    Path((tmp_path / "server").read_text().split()[1]).unlink(missing_ok=True)


def test_shared_memory_of_a_process_that_was_killed_is_removed(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        tree = started(tmp_path)
        running.wait(60)
        time.sleep(0.3)  # the guard looks twenty times a second
        for pid, _ in tree.values():
            os.kill(pid, signal.SIGKILL)
    assert left(tree) == []


def test_what_was_in_shared_memory_before_stays(tmp_path: Path) -> None:
    kept = Path(f"/dev/shm/splitpoint-test-kept-{os.getpid()}")
    folder = Path(f"/dev/shm/splitpoint-test-folder-{os.getpid()}")
    kept.write_bytes(b"weights")
    try:
        code = f"""if True:
            import mmap, os, time
            os.mkdir({str(folder)!r})
            open({str(folder / "kept")!r}, "w").write("weights")
            files = [open(name, "r+b") for name in ({str(kept)!r}, {str(folder / "kept")!r})]
            maps = [mmap.mmap(file.fileno(), 0) for file in files]
            open({str(tmp_path / "ready")!r}, "w")
            time.sleep(600)
        """
        command = [sys.executable, "-c", code]
        with Server(command, free_port(), os.environ, tmp_path / "log", 0.5):
            deadline = time.monotonic() + 60
            while not (tmp_path / "ready").exists():
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.02)
        assert kept.read_bytes() == (folder / "kept").read_bytes() == b"weights"
    finally:
        kept.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_server_that_does_not_answer_is_said(tmp_path: Path) -> None:
    with server(tmp_path, "no") as running:
        tree = started(tmp_path)
        with pytest.raises(ServerFailed, match=r"did not answer within 0.2 s.*said before"):
            running.wait(0.2)
    assert left(tree) == []


def test_a_server_that_cannot_start_is_said(tmp_path: Path) -> None:
    code = "print('ValueError: no such model'); raise RuntimeError('see the root cause above')"
    command = [sys.executable, "-c", code]
    with (
        Server(command, free_port(), os.environ, tmp_path / "log") as running,
        pytest.raises(ServerFailed, match="ended with 1: ValueError: no such model"),
    ):
        running.wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_ends_the_benchmark_ends_the_server(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""if True:
        import signal, time
        from pathlib import Path
        from tests.bench.test_server import server
        # Ignored, if whoever runs the tests was started in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with server(Path({str(tmp_path)!r})) as running:
            time.sleep(600)
    """
    benchmark = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
        stderr=subprocess.DEVNULL,
    )
    try:
        tree = started(tmp_path)
        os.killpg(benchmark.pid, number)  # as a terminal does
        benchmark.wait(60)
        if number == signal.SIGINT:  # there, all has ended before the benchmark does
            assert left(tree) == []
        assert ends(tree)
    finally:
        benchmark.kill()
        benchmark.wait()
