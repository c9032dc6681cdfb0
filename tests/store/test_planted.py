"""A store that somebody else planted, with hashes that are right and a library of their own: it is
not loaded, and what is compiled instead gives the right results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitpoint.store.store import Store

pytestmark = pytest.mark.processes

OTHER = 54321

RUN = """
import json, logging, sys
import torch
from splitpoint import Config, compile

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        return torch.nn.functional.gelu(self.linear(x))

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("splitpoint").addHandler(handler)
torch.set_num_threads(1)
found = []
for folder in sys.argv[1:]:
    said.clear()
    module, x = Network(), torch.randn(3, 8)
    compiled = compile(module, Config(max_size=8, linear="inductor", cache_dir=folder))
    torch.testing.assert_close(compiled(x), module(x))
    found.append([compiled.stats().compilations, compiled.stats().loads, list(said)])
print(json.dumps(found))
"""


def starts(*folders: Path) -> list[tuple[int, int, list[str]]]:
    """What one process did with some stores: pieces compiled, pieces loaded, warnings."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, folders)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(each) for each in json.loads(done.stdout.splitlines()[-1])]


def plant(good: Path, folder: Path, mark: Path) -> None:
    """A copy of a store whose kernels are exchanged for a library that leaves a mark when it is
    loaded."""
    source, library = mark.with_suffix(".cpp"), mark.with_suffix(".so")
    source.write_text(
        "#include <cstdio>\n"
        "__attribute__((constructor)) static void run() "
        f'{{ if (FILE* file = fopen("{mark}", "w")) fclose(file); }}\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    kept, planted = Store(good), Store(folder)
    digest = planted.write_object(library.read_bytes())
    assert digest is not None
    entries = [
        (kind, key, kept.read(kind, key, use=False) or {}) for kind, key, _ in kept.entries()
    ]
    kernels = {each for kind, _, entry in entries if kind == "pieces" for each in entry["objects"]}
    for path in kept.objects():
        if path.name not in kernels:
            planted.write_object(path.read_bytes())
    for kind, key, entry in entries:
        text = json.dumps(entry)
        for each in kernels:
            text = text.replace(each, digest)
        assert planted.write(kind, key, json.loads(text))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_planted_store_is_not_loaded(tmp_path: Path) -> None:
    good = tmp_path / "good"
    ((compilations, loads, said),) = starts(good)
    assert (compilations, loads, said) == (1, 0, [])

    def place(name: str) -> tuple[Path, Path]:
        """A folder with a planted store in it, and the mark that loading it leaves."""
        (tmp_path / name).mkdir()
        folder, mark = tmp_path / name / "kept", tmp_path / f"{name}-loaded"
        plant(good, folder, mark)
        return folder, mark

    trusted = place("trusted")
    cases = {
        name: place(name)
        for name in ("parent", "parents_owner", "owner", "mode", "kinds", "objects", "file")
    }
    cases["parent"][0].parent.chmod(0o777)
    os.chown(cases["parents_owner"][0].parent, OTHER, OTHER)
    for path in (cases["owner"][0], *cases["owner"][0].glob("**/*")):
        os.chown(path, OTHER, OTHER)
    cases["mode"][0].chmod(0o775)
    for folder in (cases["kinds"][0] / "models", cases["kinds"][0] / "pieces"):
        os.chown(folder, OTHER, OTHER)
    objects = cases["objects"][0] / "objects"
    objects.rename(tmp_path / "theirs")
    objects.symlink_to(tmp_path / "theirs")
    for path in Store(cases["file"][0]).objects():
        os.chown(path, OTHER, OTHER)
    # By a link that another user put into a sticky folder to a store that the user owns.
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    target, mark = place("target")
    (sticky / "link").symlink_to(target.parent)
    os.lchown(sticky / "link", OTHER, OTHER)
    cases["link"] = sticky / "link" / "kept", mark

    found = dict(zip(cases, starts(*(folder for folder, _ in cases.values())), strict=True))
    for name, (compilations, loads, said) in found.items():
        assert (compilations, loads) == (1, 0), name
        assert not cases[name][1].exists(), name
        assert said, name
        assert all(len(each.splitlines()) <= 3 for each in said), name
    for name in ("parent", "parents_owner", "owner", "mode", "link"):
        assert len(found[name][2]) == 1
        assert found[name][2][0].startswith("store: not used: the store ")
    # Where only a part was another's, that was set aside and the store is in use again.
    parts = ("kinds", "objects", "file")
    for compilations, loads, said in starts(*(cases[name][0] for name in parts)):
        assert (compilations, loads, said) == (0, 1, [])
    # Where nothing says that it is another's, it is run: the above could fail.
    ((compilations, _, _),) = starts(trusted[0])
    assert compilations == 1  # as there is no kernel in it
    assert trusted[1].exists()
