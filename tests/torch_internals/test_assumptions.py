"""Where an assumption comes from, as it is said to the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpoint.torch_internals.assumptions import _origin


@pytest.mark.skipif(Path.cwd().drive != "", reason="torch cuts paths short where there is one root")
def test_a_path_has_all_its_characters(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.touch()
    for path in (str(file), str(file)[2:]):  # as torch has it, where its own is under another
        location = f"return x + 1  # {path}:9 in <lambda> (_dynamo/guards.py:3 in add)"
        assert _origin(location) == f"{file}:9 in <lambda>"
    assert _origin("y = x  # no/such/file.py:2 in f") == "no/such/file.py:2 in f"
