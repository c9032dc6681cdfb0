"""Nobody else's code is run: folders that others could exchange, links, and files exchanged
between their check and their use. Real files, users and libraries throughout."""

from __future__ import annotations

import contextlib
import ctypes
import grp
import logging
import os
import pwd
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitpoint import Config
from splitpoint.errors import UntrustedStore
from splitpoint.paths import make_folder, trusted_path
from splitpoint.store import open_store
from splitpoint.store.store import Store

OTHER = 54321
"""A user that is no user of this system."""

KEY = "ab" * 32
DATA = b"content" * 99

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that other users get to."""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001 and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o011)
    return tmp_path


@contextlib.contextmanager
def as_user(user: int, group: int | None = None) -> Iterator[None]:
    """Inside, this process is another user, without further groups."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(user if group is None else group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def make(path: Path, mode: int = 0o755, user: int = -1, group: int = -1) -> Path:
    path.mkdir()
    os.chown(path, user, group)
    path.chmod(mode)
    return path


def fill(store: Store) -> str:
    digest = store.write_object(DATA)
    assert digest is not None
    assert store.write("pieces", KEY, {"objects": [digest]})
    return digest


def works(folder: Path) -> bool:
    """Whether a store is used: what is there is read, and what is not is written."""
    store = open_store(Config(cache_dir=str(folder)))
    return store is not None and store.object(fill(store)) == DATA


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "splitpoint"]


# --- the way to a store ----------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o757, 0o772])
@pytest.mark.parametrize("level", ["parent", "above"])
def test_no_folder_on_the_way_may_be_written_by_others(
    tmp_path: Path, level: str, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "above" / "parent" / "kept"
    assert works(folder)
    open_ = tmp_path / "above" if level == "above" else folder.parent
    open_.chmod(mode)
    os.chown(open_, -1, OTHER if os.geteuid() == 0 else -1)
    if os.geteuid() != 0 and mode == 0o770:
        pytest.skip("the group may be the user's own")
    assert open_store(Config(cache_dir=str(folder))) is None
    (said,) = warnings(caplog)
    assert f"{open_} may be written by others (mode {mode:o})" in said
    assert "expected: " in said
    assert f"chmod go-w {open_}" in said
    assert len(said.splitlines()) <= 3
    store = Store(folder)  # without asking first
    assert store.read("pieces", KEY) is None
    assert not store.write("pieces", KEY, {})
    assert store.keys("pieces") == []
    open_.chmod(0o755)
    assert works(folder)


def test_a_store_that_is_not_there_is_refused_where_others_could_make_it(tmp_path: Path) -> None:
    make(tmp_path / "open", 0o777)
    with pytest.raises(UntrustedStore, match="may be written by others"):
        Store(tmp_path / "open" / "not" / "yet").check_trust()
    assert Store(tmp_path / "open" / "not" / "yet").write_object(DATA) is None
    assert not list((tmp_path / "open").iterdir())


@needs_root
def test_no_folder_on_the_way_may_be_another_users(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert works(tmp_path / "above" / "kept")
    os.chown(tmp_path / "above", OTHER, OTHER)
    assert not works(tmp_path / "above" / "kept")
    assert f"{tmp_path / 'above'} belongs to user {OTHER}" in warnings(caplog)[0]


def test_a_sticky_folder_may_be_on_the_way(tmp_path: Path) -> None:
    make(tmp_path / "sticky", 0o1777)
    assert works(tmp_path / "sticky" / "kept")
    assert works(tmp_path / "sticky" / "more" / "kept")
    with pytest.raises(UntrustedStore):
        Store(tmp_path / "sticky").check_trust()  # on the way, but no store itself


@needs_root
def test_what_others_put_into_a_sticky_folder_is_not_passed(base: Path) -> None:
    sticky = make(base / "sticky", 0o1777)
    own = make(base / "own")
    assert works(own / "kept")
    with as_user(OTHER):
        (sticky / "folder").mkdir()
        (sticky / "link").symlink_to(own)
    (sticky / "own link").symlink_to(own)
    for name, problem in (("folder", "belongs to"), ("link", "the link .* belongs to")):
        with pytest.raises(UntrustedStore, match=problem):
            Store(sticky / name / "kept").check_trust()
    assert works(sticky / "own link" / "kept")
    os.chown(sticky, OTHER, -1)  # whose sticky folder it is may rename all in it
    with pytest.raises(UntrustedStore, match="belongs to"):
        Store(sticky / "own link" / "kept").check_trust()


def test_what_a_link_leads_through_is_proven_as_well(tmp_path: Path) -> None:
    open_ = make(tmp_path / "open", 0o755)
    assert works(open_ / "kept")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "own" / ".." / "open")
    make(tmp_path / "own")
    assert works(tmp_path / "first" / "kept")
    assert trusted_path(tmp_path / "first" / "kept", "it") == open_ / "kept"
    open_.chmod(0o777)
    assert not works(tmp_path / "first" / "kept")
    open_.chmod(0o755)
    (tmp_path / "own").chmod(0o777)  # passed and left again
    assert not works(tmp_path / "first" / "kept")
    (tmp_path / "round").symlink_to("round")
    assert not works(tmp_path / "round" / "kept")


def test_a_link_to_a_folder_that_is_not_there_yet_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    assert works(tmp_path / "link" / "kept")
    assert (tmp_path / "scratch" / "kept").is_dir()


@needs_root
def test_a_home_that_roots_link_leads_to(base: Path) -> None:
    make(make(base / "disk") / "user", 0o700, OTHER, OTHER)
    (base / "home").symlink_to("disk")
    with as_user(OTHER):
        assert works(base / "home" / "user" / ".cache" / "kept")


@needs_root
def test_roots_read_only_store_is_read(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(base / "image" / "kept")
    digest = fill(store)
    for path in (store.folder, *store.folder.glob("**/*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with as_user(OTHER):
        found = open_store(Config(cache_dir=str(store.folder)))
        assert found is not None
        assert found.keys("pieces") == [KEY]
        assert found.read("pieces", KEY) is not None
        assert found.object(digest) == DATA
        assert found.verify() == []
        assert warnings(caplog) == []
        assert not found.write("pieces", "cd" * 32, {})
    assert len(warnings(caplog)) == 1


@needs_root
def test_a_store_that_a_group_may_read(base: Path) -> None:
    store = Store(base / "cluster" / "kept")
    digest = fill(store)
    for path in (store.folder.parent, store.folder, *store.folder.glob("**/*")):
        os.chown(path, 0, 4242)
        path.chmod(0o2750 if path.is_dir() else 0o640)
    assert works(store.folder)
    with as_user(OTHER, 4242):
        assert Store(store.folder).object(digest) == DATA


# --- a umask of 002 --------------------------------------------------------------------


def test_what_is_made_on_the_way_is_not_open_to_a_group(tmp_path: Path) -> None:
    previous = os.umask(0o002)
    try:
        assert works(tmp_path / "a" / "b" / "kept")
        make_folder(tmp_path / "c" / "d")
    finally:
        os.umask(previous)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a" / "b" / "kept").stat().st_mode & 0o777 == 0o700
    assert works(tmp_path / "c" / "d" / "kept")


def user_with_own_group() -> pwd.struct_passwd:
    users = pwd.getpwall()
    for user in users:
        with contextlib.suppress(KeyError):
            group = grp.getgrgid(user.pw_gid)
            alone = sum(each.pw_gid == user.pw_gid for each in users) == 1
            if user.pw_uid and group.gr_name == user.pw_name and alone and not group.gr_mem:
                return user
    pytest.skip("no user of this system has a group alone")


def access_list(user: int) -> bytes:
    """An access control list that lets one more user write."""
    own, named, group, mask, other, nobody = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF
    rows = ((own, 7, nobody), (named, 7, user), (group, 5, nobody), (mask, 7, nobody))
    rows += ((other, 5, nobody),)
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


@needs_root
def test_a_home_that_the_users_own_group_may_write(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user = user_with_own_group()
    home = make(base / "home", 0o775, user.pw_uid, user.pw_gid)
    with as_user(user.pw_uid, user.pw_gid):
        assert works(home / ".cache" / "kept")
        home.chmod(0o777)
        assert not works(home / ".cache" / "kept")
        home.chmod(0o775)
        (home / ".cache" / "kept").chmod(0o770)
        assert not works(home / ".cache" / "kept")  # that is no umask: it is made with 700
        (home / ".cache" / "kept").chmod(0o700)
    os.chown(home, -1, 4242)
    with as_user(user.pw_uid, user.pw_gid):
        assert not works(home / ".cache" / "kept")
    assert f"chmod go-w {home}" in warnings(caplog)[-1]
    os.chown(home, -1, user.pw_gid)
    try:
        os.setxattr(home, "system.posix_acl_access", access_list(OTHER))
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    assert home.stat().st_mode & 0o777 == 0o775
    with as_user(user.pw_uid, user.pw_gid):
        assert not works(home / ".cache" / "kept")


# --- links in a store ------------------------------------------------------------------


@pytest.mark.parametrize("what", ["entry", "object", "two digits", "kind", "objects"])
def test_no_link_in_a_store_is_followed(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "kept")
    digest = fill(store)
    entry, object_ = store.entry_path("pieces", KEY), store.object_path(digest)
    path = {
        "entry": entry,
        "object": object_,
        "two digits": object_.parent,
        "kind": entry.parent.parent,
        "objects": object_.parent.parent,
    }[what]
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = sorted(elsewhere.glob("**/*"))
    assert store.verify()
    is_entry = what in ("entry", "kind")
    assert (store.read("pieces", KEY) if is_entry else store.object(digest)) is None
    assert fill(store) == digest
    assert not path.is_symlink()
    assert (store.read("pieces", KEY) if is_entry else store.object(digest)) is not None
    assert store.verify() == []
    assert any("link" in line for line in warnings(caplog))
    for each in store.folder.glob("aside/*"):
        each.unlink()
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(elsewhere)
    store.prune(0)
    assert sorted(elsewhere.glob("**/*")) == before


def test_locks_and_what_is_set_aside_stay_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept")
    digest = fill(store)
    elsewhere = make(tmp_path / "elsewhere")
    for name in ("locks", "aside"):
        (store.folder / name).symlink_to(elsewhere)
    with store.lock(KEY) as held:
        assert not held  # nor can the link be set aside
    store.object_path(digest).write_bytes(b"damaged")
    assert store.object(digest) is None
    assert fill(store)
    assert not list(elsewhere.iterdir())
    (store.folder / "aside").unlink()
    with store.lock(KEY) as held:
        assert held
    path = store.folder / "locks" / f"{KEY}.lock"
    path.unlink()
    path.symlink_to(elsewhere / "lock")
    with store.lock(KEY) as held:
        assert not held
    assert not list(elsewhere.iterdir())


@needs_root
@pytest.mark.parametrize("what", ["two digits", "kind"])
def test_no_folder_in_a_store_may_be_open_to_others(tmp_path: Path, what: str) -> None:
    store = Store(tmp_path / "kept")
    digest = fill(store)
    path = store.object_path(digest).parent
    path = path.parent if what == "kind" else path
    for change in (lambda: path.chmod(0o770), lambda: os.chown(path, OTHER, -1)):
        change()
        assert store.object(digest) is None
        assert fill(store) == digest
        assert store.object(digest) == DATA
    assert not Store(tmp_path / "kept").verify()


# --- exchanged between check and use ---------------------------------------------------


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Shared libraries whose `answer` is 0, 1, ..., each its own."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("libraries")
    found = []
    for number in range(4):
        source, path = folder / f"{number}.cpp", folder / f"{number}.so"
        source.write_text(f'extern "C" int answer() {{ return {number}; }}\n')
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", path], check=True)
        found.append(path.read_bytes())
    return found


START = """
import ctypes, os, resource, sys
from pathlib import Path
from splitpoint.store.store import Store

def answer(path):
    return ctypes.CDLL(str(path)).answer()

folder, digests = Path(sys.argv[1]), sys.argv[2:]
"""


def run(code: str, store: Store, *digests: str, under: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*under, sys.executable, "-c", START + code, str(store.folder), *digests],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


EXCHANGE = """
def exchange(step):
    if step == "checked":
        path, other = (Store(folder).object_path(digest) for digest in digests)
        Path(f"{path}-evil").write_bytes(other.read_bytes())
        os.replace(f"{path}-evil", path)

path = Store(folder, step=exchange).library(digests[0])
assert ctypes.CDLL(str(Store(folder).object_path(digests[0]))).answer() == 1  # it was exchanged
assert answer(path) == 0
assert answer(path) == 0
assert Store(folder).library(digests[0]) is None
assert Path(path).read_bytes()
"""


@pytest.mark.parametrize("without_proc", [False, True], ids=["proc", "no proc"])
def test_what_was_checked_is_loaded_though_its_file_was_exchanged(
    tmp_path: Path, libraries: list[bytes], without_proc: bool
) -> None:
    store = Store(tmp_path / "kept")
    digests = [str(store.write_object(each)) for each in libraries[:2]]
    under: tuple[str, ...] = ()
    check = "assert str(path).startswith('/proc/self/fd/'), path"
    if without_proc:
        hide = 'mount -t tmpfs none /proc && exec "$0" "$@"'
        under = ("unshare", "--mount", "sh", "-c", hide)
        check = "import stat; assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, path"
        check += "; print(path.parent, file=sys.stderr)"
        if shutil.which("unshare") is None or subprocess.run([*under, "true"]).returncode:
            pytest.skip("/proc cannot be hidden here")
    said = run(f"{EXCHANGE}\n{check}", store, *digests, under=under)
    if without_proc:
        assert not Path(said.splitlines()[-1]).exists()


CLOSED = """
store = Store(folder)
paths = []
for number, each in enumerate(digests):
    paths.append(store.library(each))
    assert answer(paths[-1]) == number
    os.close(int(paths[-1].name))  # as a process does that becomes a daemon: it comes again
assert len(set(paths)) == len(digests)
assert [answer(path) for path in paths] == [0, 1, 2, 3]
child = os.fork()
if not child:
    os._exit(int([answer(path) for path in paths] != [0, 1, 2, 3]))
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_name_is_never_given_twice(tmp_path: Path, libraries: list[bytes]) -> None:
    store = Store(tmp_path / "kept")
    run(CLOSED, store, *[str(store.write_object(each)) for each in libraries])


TOO_MANY = """
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import tempfile; tempfile.gettempdir()
opened = []

def fill(step=""):
    try:
        while True:
            opened.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass

fill()
assert Store(folder).library(digests[0]) is None
for each in opened[-8:]:
    os.close(each)
del opened[-8:]
assert Store(folder, step=fill).library(digests[0]) is None
os.close(opened.pop())  # enough for a copy, not for a descriptor that stays
for each in opened:
    os.close(each)
assert answer(Store(folder).library(digests[0])) == 0
"""


def test_too_many_open_files_are_no_damage(tmp_path: Path, libraries: list[bytes]) -> None:
    store = Store(tmp_path / "kept")
    run(TOO_MANY, store, str(store.write_object(libraries[0])))
    assert not (store.folder / "aside").exists()


SWAP = """
import os, sys
one, two, spare = sys.argv[1:]
print(flush=True)
while True:
    os.rename(one, spare); os.rename(two, one); os.rename(spare, two)
"""


def test_a_file_that_is_exchanged_all_the_time(tmp_path: Path, libraries: list[bytes]) -> None:
    """Whatever is loaded, and often nothing is, is what was asked for."""
    store = Store(tmp_path / "kept")
    digest = str(store.write_object(libraries[2]))
    other = store.object_path(digest).with_name("other")
    other.write_bytes(libraries[3])
    other.chmod(0o600)
    arguments = [store.object_path(digest), other, other.with_name("spare")]
    swapping = subprocess.Popen(
        [sys.executable, "-c", SWAP, *map(str, arguments)], stdout=subprocess.PIPE
    )
    try:
        assert swapping.stdout is not None
        swapping.stdout.readline()
        found, end = 0, time.monotonic() + 1.0
        logging.getLogger("splitpoint").setLevel(logging.ERROR)
        while time.monotonic() < end:
            if (path := store.library(digest)) is not None:
                assert ctypes.CDLL(str(path)).answer() == 2
                assert path.read_bytes() == libraries[2]
                found += 1
            elif not store.object_path(digest).exists():  # one of them was set aside
                with contextlib.suppress(OSError):
                    store.write_object(libraries[2])
    finally:
        logging.getLogger("splitpoint").setLevel(logging.NOTSET)
        swapping.kill()
        swapping.communicate()
    assert found


FOREIGN = """
import itertools, os, random, sys, time
where, target = sys.argv[1:]
print(flush=True)
for turn in itertools.count():
    try:
        if turn % 2:
            os.mkdir(where, 0o777)
        else:
            os.symlink(target, where)
        time.sleep(random.random() / 500)  # there, and gone, for the other to find
        os.rename(where, f"{target}/{turn}")  # with all that was put into it
        time.sleep(random.random() / 100)
    except OSError:
        pass
"""


@needs_root
def test_another_user_who_makes_the_folder_first(base: Path) -> None:
    """In a sticky folder two race for a name: the store is the user's own, or not used."""
    sticky = make(base / "sticky", 0o1777)
    theirs = make(base / "theirs", 0o777, OTHER, OTHER)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not installed")
    where = sticky / "taken"
    other = [setpriv, f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", "--inh-caps=-all"]
    racing = subprocess.Popen(
        [*other, "/usr/bin/env", "python3", "-c", FOREIGN, str(where), str(theirs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert racing.stdout is not None
        if not racing.stdout.readline():
            pytest.skip("the other user has no Python")
        won = lost = 0
        end = time.monotonic() + 2.0
        logging.getLogger("splitpoint").setLevel(logging.ERROR)
        # On a machine that is busy elsewhere one of the two may not come to run in this time.
        while time.monotonic() < (end if won and lost else end + 60):
            if Store(where / "kept").write_object(DATA) is None:
                lost += 1
            else:
                won += 1
                where.rename(base / f"won-{won}")
    finally:
        logging.getLogger("splitpoint").setLevel(logging.NOTSET)
        racing.kill()
        racing.communicate()
    assert won
    assert lost
    assert all(path.lstat().st_uid == 0 for path in base.glob("won-*"))
    assert all(path.lstat().st_uid == 0 for path in base.glob("won-*/kept/objects"))
    assert not list(theirs.glob("**/kept"))  # nothing is made where they have the say
