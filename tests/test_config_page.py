"""docs/config.md is what the source says of each field: `python tests/test_config_page.py` writes
it anew."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from pathlib import Path

from splitpoint import config

PAGE = Path(__file__).parent.parent / "docs" / "config.md"

HEAD = """\
# The fields of Config

`Config(name=value, ...)` in Python, `--config FILE` with the same names in JSON on the command
line, `options={...}` with torch.compile's backend. Each is checked when it is written down, and an
error names the field, the value and what to do. `splitpoint plan MODEL --config FILE` shows what a
file asks for, without compiling. `compile_ranges_split_points` and `compile_ranges_endpoints` are
vLLM's names of `split_points`.
"""


def page() -> str:
    tree = ast.parse(inspect.getsource(config))
    (body,) = (n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    kinds = {
        target.id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and "Literal" in ast.unparse(node.value)
    }
    parts = [HEAD]
    for field, doc in itertools.pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(doc, ast.Expr):
            continue
        name = ast.unparse(field.target)
        default = repr(getattr(config.Config(), name))
        if "mappingproxy" in default:
            default = "{}"
        kind = ast.unparse(field.annotation)
        for alias, literal in kinds.items():
            if kind.split(" ")[0] == alias:
                kind = kind.replace(alias, " | ".join(literal[len("Literal[") : -1].split(", ")))
        assert isinstance(doc.value, ast.Constant)
        text = textwrap.fill(" ".join(doc.value.value.split()), 100, break_on_hyphens=False)
        parts.append(f"**{name}**: `{kind.replace(chr(39), chr(34))}` = `{default}`\n\n{text}\n")
    return "\n".join(parts)


def test_the_page_has_every_field_as_the_source_has_it() -> None:
    assert PAGE.read_text() == page(), "python tests/test_config_page.py"
    for field in dataclasses.fields(config.Config):
        assert f"\n**{field.name}**: " in page()


if __name__ == "__main__":
    PAGE.write_text(page())
