"""Another user, with a HOME of its own, makes the same keys and starts from a copied store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import splitpoint

PACKAGE = str(Path(splitpoint.__file__).parents[1])
USER = 65534

RUN = """
import json, os, sys
from pathlib import Path
import torch
from splitpoint import Config, compile
from splitpoint.store.store import Store

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        return torch.nn.functional.gelu(self.linear(x))

torch.set_num_threads(1)
found = []
for folder in sys.argv[1:]:
    module, x = Network(), torch.randn(3, 8)
    compiled = compile(module, Config(max_size=8, linear="inductor", cache_dir=folder))
    torch.testing.assert_close(compiled(x), module(x))
    stats = compiled.stats()
    imported = "torch._dynamo" in sys.modules
    keys = [[kind, key] for kind, key, _ in Store(Path(folder)).entries()]
    found.append([stats.compilations, stats.loads, imported, keys])
print(json.dumps([os.getuid(), found]))
"""


def start(prefix: Sequence[str], folder: Path, *stores: Path, **variables: str) -> Any:
    """What a process in a folder did, store by store: (compilations, loads, Dynamo imported,
    keys); and whose it was."""
    done = subprocess.run(
        [*prefix, sys.executable, str(folder / "network.py"), *map(str, stores)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1", **variables},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def as_another_user() -> list[str]:
    """A command that runs a command as another user.

    One who may read all files, for the interpreter may lie in a HOME that is closed to others;
    whom a store belongs to, and who may write, is that user's own affair.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if (setpriv := shutil.which("setpriv")) is None:
        pytest.skip("setpriv (util-linux) is not installed")
    reading = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    prefix = [setpriv, f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *reading]
    done = subprocess.run(
        [*prefix, sys.executable, "-c", "import sys"], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"user {USER} cannot run {sys.executable}: {done.stderr.strip()}")
    return prefix


def give(folder: Path) -> None:
    for path in (folder, *folder.glob("**/*")):
        os.chown(path, USER, USER)


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """A folder that other users get to, whose names they need not see."""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o011)
    return tmp_path


@pytest.mark.processes
def test_another_user_makes_the_same_keys_and_starts_from_a_copy(
    open_path: Path, as_another_user: list[str]
) -> None:
    one, home = open_path / "one", open_path / "home"
    for folder in (one, home):
        folder.mkdir()
        (folder / "network.py").write_text(RUN)
    kept, copied, empty = one / "kept", home / "copied", home / "empty"
    own, [(compilations, loads, _, keys)] = start((), one, kept, PYTHONHASHSEED="1")
    assert (own, compilations, loads) == (0, 1, 0)
    assert sorted(kind for kind, _ in keys) == ["models", "pieces"]
    shutil.copytree(kept, copied)
    give(home)
    before = {path: path.stat().st_mtime_ns for path in kept.glob("**/*")}
    elsewhere = {
        "HOME": str(home),
        "XDG_CACHE_HOME": "",
        "SPLITPOINT_CACHE": "",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "PYTHONHASHSEED": "2",
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
    }
    other, [from_copy, anew, from_root] = start(
        as_another_user, home, copied, empty, kept, **elsewhere
    )
    assert other == USER
    assert from_copy == [0, 1, False, keys]
    assert anew == [1, 0, True, keys]
    assert from_root == [0, 1, True, keys]  # root is trusted; only read, for it may not write
    assert {path: path.stat().st_mtime_ns for path in kept.glob("**/*")} == before
