"""The table of private names: whole, printable, and what it says happens without each entry."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import splitpoint
from splitpoint.errors import UnsupportedTorch
from splitpoint.torch_internals import names, probe
from splitpoint.torch_internals.names import USES

PACKAGE = Path(splitpoint.__file__).parent
ROOT = Path(__file__).parents[2]
ENTRIES = [entry for use in USES for entry in use.entries]
DOTTED = {re.sub(r"\(.*", "", entry).replace(":", ".").replace("@", ".") for entry in ENTRIES}


def is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    # Operators of another package (torch.ops._C of vLLM's) are not torch's.
    return (
        parts[0] == "torch"
        and parts[1:3] != ["ops", "_C"]
        and any(re.match(r"_(?!_)", part) for part in parts)
    )


def in_table(dotted: str) -> bool:
    """Whether an entry is the name, or lies in it (a module or a class of which more is used)."""
    return any(name == dotted or name.startswith(f"{dotted}.") for name in DOTTED)


def private_names(source: str) -> set[str]:
    """The names of torch in a module's code that have a part that starts with one underscore."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.update(f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if is_private(name)}


def members(source: str) -> set[str]:
    """Attributes that start with one underscore, of anything but `self` and `cls`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and re.match(r"_(?!_)", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


INTERNALS = sorted((PACKAGE / "torch_internals").glob("*.py"))


@pytest.mark.parametrize("path", INTERNALS, ids=lambda path: path.name)
def test_every_private_name_is_in_the_table(path: Path) -> None:
    source = path.read_text()
    assert {name for name in private_names(source) if not in_table(name)} == set()
    parts = {part for name in DOTTED for part in name.split(".")}
    own = set(re.findall(r"self\.(_\w+)\b", source))
    assert members(source) - parts - own == set()


def test_private_names_are_used_in_one_folder_only() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name != "torch_internals":
            assert private_names(path.read_text()) == set(), path


@pytest.mark.parametrize("entry", sorted(set(ENTRIES)))
def test_an_entry_is_there_and_as_expected(entry: str) -> None:
    missing = {use.key for use in USES if entry in use.entries and not probe.fits(use.key)}
    if missing:
        pytest.skip(f"this torch does without {', '.join(missing)}")
    assert probe.misfit(entry) is None


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("torch.nowhere:name", "has no torch.nowhere.name"),
        ("torch._dynamo:nothing", "has no torch._dynamo.nothing"),
        ("torch._dynamo:disable(1, another)", "has a torch._dynamo.disable that takes other"),
        ("torch._dynamo:disable(9)", "takes other arguments"),
        ("torch.fx.experimental.symbolic_shapes:ShapeEnv@no_such", "ShapeEnv.no_such"),
        ("torch.ops.aten:no_such_operator", "has no torch.ops.aten.no_such_operator"),
    ],
)
def test_what_does_not_fit_is_told(entry: str, why: str) -> None:
    assert why in str(probe.misfit(entry))


def test_what_is_needed_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    use = names.Use("x", "needed", "do this", "raises", ("torch._dynamo:nothing",))
    monkeypatch.setitem(probe._BY_KEY, "x", use)
    with pytest.raises(UnsupportedTorch, match=r"has no torch\._dynamo\.nothing, .* to do this"):
        probe.require("x")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("way", ["renamed", "changed"])
def test_each_use_without_its_names_is_right_or_unsupported(tmp_path: Path, way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torch_internals.without", str(tmp_path), way],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{PACKAGE.parent}",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
            "OMP_NUM_THREADS": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("") == dict.fromkeys(("ranges", "backend", "group", "measured"), "right")
    assert found.keys() == {use.key for use in USES}
    for use in USES:
        allowed = {"right", "UnsupportedTorch"} if use.kind == "needed" else {"right"}
        assert set(found[use.key].values()) <= allowed, (use.key, found[use.key])
        if use.kind == "needed":
            assert "UnsupportedTorch" in found[use.key].values(), use.key
