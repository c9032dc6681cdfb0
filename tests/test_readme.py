"""The README's examples run, its commands exist, and links of the documentation lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from splitpoint.cli.verbs import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_examples_run(capsys: pytest.CaptureFixture[str]):
    names: dict[str, object] = {}
    first, backend = BLOCKS
    exec(first, names)
    out = capsys.readouterr().out
    assert [f"torch.Size([{n}, 64])" in out for n in (1, 5, 200)] == [True] * 3
    for range_ in ("[1,1]", "[1,8]", "[9,64]", "[65,512]"):
        assert out.count(range_) >= 1, out
    if "splitpoint" not in torch.compiler.list_backends():
        pytest.skip("the package is not installed, so torch does not know its backend")
    exec(backend, names)
    assert "torch.Size([5, 64])" in capsys.readouterr().out


def test_every_command_it_names_exists():
    text = "".join(page.read_text() for page in PAGES)
    commands = set(re.findall(r"`splitpoint ([a-z ]+?)(?: MODEL)?`", text))
    assert len(commands) >= 3
    for command in commands:
        with pytest.raises(SystemExit) as end:
            main([*command.split(), "--help"])
        assert end.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link
