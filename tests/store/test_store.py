"""A store under damage, foreign hands, full disks and sudden ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitpoint.errors import UntrustedStore
from splitpoint.store.store import Store

KEY, OTHER = "ab" * 32, "cd" * 32
DATA = bytes(range(256)) * 20

STEPS = ("folder", "created", "half", "written", "synced", "renamed")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "kept", lock_timeout_s=5)


def fill(store: Store, key: str = KEY, value: int = 1) -> str:
    digest = store.write_object(DATA)
    assert digest is not None
    assert store.write("pieces", key, {"value": value, "objects": [digest]})
    return digest


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "splitpoint"]


def test_what_is_written_is_read_back(store: Store) -> None:
    assert store.read("pieces", KEY) is None
    digest = fill(store)
    entry = store.read("pieces", KEY)
    assert entry is not None
    assert entry["value"] == 1
    assert store.object(digest) == DATA
    assert store.verify() == []
    assert not list(store.folder.glob("**/tmp-*"))


def test_files_are_the_users_alone(store: Store) -> None:
    previous = os.umask(0)
    try:
        fill(store)
    finally:
        os.umask(previous)
    for path in store.folder.glob("**/*"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("what", ["entry", "object"])
def test_no_flipped_byte_is_ever_read(store: Store, what: str) -> None:
    digest = fill(store)
    path = store.entry_path("pieces", KEY) if what == "entry" else store.object_path(digest)
    good = path.read_bytes()
    step = max(1, len(good) // 97)
    for position in [*range(0, len(good), step), len(good) - 1]:
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bytes(bad))
        found = store.read("pieces", KEY) if what == "entry" else store.object(digest)
        assert found is None, position
        assert not path.exists()  # set aside: the next writer finds room
        path.write_bytes(good)
        path.chmod(0o600)
    assert store.verify() == []


@pytest.mark.parametrize("what", ["entry", "object"])
def test_no_truncated_or_longer_file_is_ever_read(store: Store, what: str) -> None:
    digest = fill(store)
    path = store.entry_path("pieces", KEY) if what == "entry" else store.object_path(digest)
    good = path.read_bytes()
    for bad in (b"", good[:1], good[: len(good) // 2], good[:-1], good + b"x", good + good):
        path.write_bytes(bad)
        path.chmod(0o600)
        assert (store.read("pieces", KEY) if what == "entry" else store.object(digest)) is None
        path.write_bytes(good)
        path.chmod(0o600)


def test_swapped_entries_and_objects_are_told_apart(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, KEY, 1)
    fill(store, OTHER, 2)
    first, second = store.entry_path("pieces", KEY), store.entry_path("pieces", OTHER)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert store.read("pieces", KEY) is None
    assert store.read("pieces", OTHER) is None
    assert sum("another key" in line for line in lines(caplog)) == 2
    digests = [store.write_object(b"one"), store.write_object(b"two")]
    paths = [store.object_path(str(digest)) for digest in digests]
    contents = [path.read_bytes() for path in paths]
    paths[0].write_bytes(contents[1])
    paths[1].write_bytes(contents[0])
    assert [store.object(str(digest)) for digest in digests] == [None, None]
    assert all("\n" not in line for line in lines(caplog))


def test_a_damaged_object_is_written_anew(store: Store) -> None:
    digest = fill(store)
    store.object_path(digest).write_bytes(DATA[:-1])
    assert store.write_object(DATA) == digest
    assert store.object(digest) is not None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_read(
    store: Store, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    digest = fill(store)
    store.object_path(digest).chmod(mode)
    store.entry_path("pieces", KEY).chmod(mode)
    assert store.object(digest) is None
    assert store.read("pieces", KEY) is None
    assert all("may be written by others" in line for line in lines(caplog))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_file_is_not_read(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    digest = fill(store)
    os.chown(store.object_path(digest), 12345, -1)
    assert store.object(digest) is None
    assert "belongs to user 12345" in lines(caplog)[0]
    os.chown(store.folder, 12345, -1)
    with pytest.raises(UntrustedStore, match="belongs to user 12345"):
        store.check_trust()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_refused(store: Store, mode: int) -> None:
    fill(store)
    store.check_trust()
    store.folder.chmod(mode)
    with pytest.raises(UntrustedStore, match="chmod -R go-w"):
        store.check_trust()


def test_links_and_other_things_in_place_of_files_are_not_read(
    store: Store, tmp_path: Path
) -> None:
    digest = fill(store)
    path = store.object_path(digest)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert store.object(digest) is None
    os.mkfifo(path)
    assert store.object(digest) is None  # and does not wait for a writer
    path.mkdir()
    assert store.object(digest) is None


def test_what_comes_part_by_part_is_an_object_like_others(store: Store) -> None:
    digest = store.write_stream([DATA[:100], memoryview(DATA)[100:]])
    assert digest == Store.digest(DATA)
    assert store.object(digest) == DATA
    memory = store.mapped(digest)
    assert memory is not None
    assert memory[:] == DATA
    assert store.write_object(DATA) == digest
    before = store.object_path(digest).stat()
    assert store.write_stream([DATA]) == digest
    after = store.object_path(digest).stat()
    assert before.st_ino == after.st_ino  # who has it mapped shares it with who maps it now
    assert after.st_mode & 0o777 == 0o400
    assert not list(store.folder.glob("**/tmp-*"))
    assert store.verify() == []


def test_nothing_damaged_is_mapped(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    digest = str(store.write_stream([DATA]))
    path = store.object_path(digest)
    path.chmod(0o600)
    for bad in (b"", DATA[:-1], DATA + b"x", b"x" + DATA[1:]):
        path.write_bytes(bad)
        path.chmod(0o600)
        caplog.clear()
        assert store.mapped(digest) is None
        assert not path.exists()
        assert len(lines(caplog)) == 1
    assert store.mapped(digest) is None
    assert store.write_stream([DATA]) == digest
    assert store.mapped(digest) is not None


def test_a_stream_that_fails_leaves_nothing(store: Store) -> None:
    def parts() -> Iterator[bytes]:
        yield DATA
        raise KeyError("a weight that cannot be packed")

    with pytest.raises(KeyError):
        store.write_stream(parts())
    assert not list(store.objects())
    assert not list(store.folder.glob("**/tmp-*"))


# --- places that cannot be written -----------------------------------------------------


def test_a_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "kept")
    for _ in range(2):
        assert store.write_object(b"x") is None
        assert not store.write("pieces", KEY, {})
        assert store.read("pieces", KEY) is None
        with store.lock(KEY) as held:
            assert not held
    assert len(lines(caplog)) == 1  # one line, not one a write


FULL = """
import resource, sys
from pathlib import Path
from splitpoint.store.store import Store
store = Store(Path(sys.argv[1]))
assert store.write("pieces", "ab" * 32, {"small": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
assert store.write_object(b"x" * 100_000) is None
assert not store.write("pieces", "cd" * 32, {"large": "x" * 100_000})
assert store.read("pieces", "ab" * 32)["small"] == 1
assert not list(Path(sys.argv[1]).glob("**/tmp-*"))
"""


def test_a_file_size_limit_loses_the_new_entry_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "kept")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Store(tmp_path / "kept").verify() == []


def test_a_full_disk_loses_the_new_entry_alone(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(disk)],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        store = Store(disk / "kept")
        assert store.write("pieces", KEY, {"small": 1})
        assert store.write_object(os.urandom(200_000)) is None
        assert store.read("pieces", KEY) is not None
        assert store.verify() == []
        assert not list(disk.glob("**/tmp-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_is_read(store: Store) -> None:
    digest = fill(store)
    for path in [store.folder, *store.folder.glob("**")]:
        path.chmod(0o500)
    assert store.read("pieces", KEY) is not None
    assert store.object(digest) is not None
    assert not store.write("pieces", OTHER, {})


def test_a_copied_store_has_the_same_content(store: Store, tmp_path: Path) -> None:
    digest = fill(store)
    store.folder.rename(tmp_path / "moved")
    moved = Store(tmp_path / "moved")
    assert moved.read("pieces", KEY) is not None
    assert moved.object(digest) is not None


# --- sudden ends -----------------------------------------------------------------------

WRITER = """
import os, signal, sys
from pathlib import Path
from splitpoint.store.store import Store

def die(step):
    if step == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

store = Store(Path(sys.argv[1]), step=die)
with store.lock("ab" * 32) as held:
    assert held
    if sys.argv[3] == "object":
        store.write_object(bytes(range(256)) * 20)
    elif sys.argv[3] == "stream":
        store.write_stream([bytes(range(256))] * 20)
    else:
        store.write("pieces", "ab" * 32, {"value": 2, "objects": []})
"""


@pytest.mark.parametrize(
    ("what", "step"),
    [
        *((what, step) for what in ("object", "entry") for step in STEPS),
        *(("stream", "part" if step == "half" else step) for step in STEPS),
    ],
)
def test_a_writer_killed_at_any_step_leaves_a_whole_store(
    store: Store, step: str, what: str
) -> None:
    store.write("pieces", OTHER, {"value": 1, "objects": []})
    arguments = [str(store.folder), step, what]
    done = subprocess.run([sys.executable, "-c", WRITER, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert store.verify() == []
    assert store.read("pieces", OTHER) is not None  # what was complete is not lost
    entry = store.read("pieces", KEY)
    assert (entry is not None) == (step == "renamed" and what == "entry")
    start = time.monotonic()
    with store.lock(KEY) as held:  # the dead writer's lock is free at once
        assert held
    assert time.monotonic() - start < 2
    assert fill(store)
    os.utime(store.folder)
    for path in store.folder.glob("*/??/tmp-*"):
        os.utime(path, (0, 0))
    store.prune(1 << 30)
    assert not list(store.folder.glob("*/??/tmp-*"))
    assert store.read("pieces", KEY) is not None


def test_a_lock_is_given_up_on_after_its_time(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    impatient = Store(store.folder, lock_timeout_s=0.05)
    with store.lock(KEY) as first, impatient.lock(KEY) as second, store.lock(OTHER) as third:
        assert (first, second, third) == (True, False, True)
    assert "goes on without waiting" in lines(caplog)[0]


# --- keeping house ---------------------------------------------------------------------


def test_pruning_removes_what_was_used_longest_ago(store: Store) -> None:
    keys = [f"{i:02x}" * 32 for i in range(1, 6)]
    for age, key in enumerate(keys):
        digest = store.write_object(os.urandom(10_000))
        store.write("pieces", key, {"objects": [digest]})
        os.utime(store.entry_path("pieces", key), (1000 - age, 1000 - age))
    assert store.read("pieces", keys[-1]) is not None  # used just now
    removed, freed = store.prune(25_000)
    assert removed == 6  # three entries and their objects
    assert freed > 30_000
    assert [key for _, key, _ in store.entries()] == sorted([keys[0], keys[-1]])
    assert store.verify() == []
    assert store.prune(25_000) == (0, 0)


def test_pruning_keeps_a_shared_object(store: Store) -> None:
    digest = fill(store, KEY)
    fill(store, OTHER)
    os.utime(store.entry_path("pieces", KEY), (1000, 1000))
    store.prune(len(DATA) + 500)
    assert store.read("pieces", KEY) is None
    assert store.read("pieces", OTHER) is not None
    assert store.object(digest) is not None


def test_verify_names_what_is_missing(store: Store) -> None:
    digest = fill(store)
    store.object_path(digest).unlink()
    (problem,) = store.verify()
    assert digest in str(problem)


def test_entries_are_json_that_anyone_can_read(store: Store) -> None:
    fill(store)
    text = store.entry_path("pieces", KEY).read_text().splitlines()
    assert json.loads(text[1])["value"] == 1
