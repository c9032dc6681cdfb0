"""The layout: few files at the top of the package, and none that holds several ideas."""

from __future__ import annotations

from pathlib import Path

import splitpoint

PACKAGE = Path(splitpoint.__file__).parent
MOST_LINES = 500
REASON = "Longer than 500 lines because"


def test_eight_files_stand_at_the_top() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {
        *("__init__.py", "__main__.py", "api.py", "config.py", "ranges.py", "errors.py"),
        *("paths.py", "py.typed"),
    }


def test_a_long_file_says_why() -> None:
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".h", ".cpp"):
            lines = path.read_text().splitlines()
            assert len(lines) <= MOST_LINES or REASON in "\n".join(lines[:40]), path


def test_every_file_says_what_lives_there() -> None:
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".h", ".cpp"):
            head = next(line for line in path.read_text().splitlines() if line.strip())
            assert head.startswith(('"""', "//", "/*", 'r"""')), path
            assert len(head) > 12, path
