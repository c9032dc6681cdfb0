"""Signatures and constants of FlashInfer, read from its source without importing it.

`python tests/collectives/signatures.py FOLDER VERSION` writes the snapshot that the tests bind
calls against; FOLDER is that of the package `flashinfer`.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).parents[1] / "data" / "flashinfer_signatures.json"
FUNCTIONS = {
    "create_allreduce_fusion_workspace": "comm/allreduce.py",
    "allreduce_fusion": "comm/allreduce.py",
}
CONSTANTS = {
    "AllReduceFusionPattern": "comm/trtllm_ar.py",
    "QuantizationSFLayout": "comm/trtllm_ar.py",
}


def read(folder: Path) -> dict[str, Any]:
    """What `FUNCTIONS` and `CONSTANTS` name, and which of them `flashinfer.comm` exports."""
    found: dict[str, Any] = {"functions": {}, "constants": {}}
    for name, file in FUNCTIONS.items():
        given = _definition(folder / file, name).args
        names = [a.arg for a in (*given.posonlyargs, *given.args)]
        required = len(names) - len(given.defaults)
        keyword = {
            a.arg: d is None for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        }
        found["functions"][name] = {
            "positional": {n: i < required for i, n in enumerate(names)},
            "keyword_only": keyword,
        }
    for name, file in CONSTANTS.items():
        found["constants"][name] = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in _definition(folder / file, name).body
            if isinstance(node, ast.Assign)
        }
    exported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse((folder / "comm" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found["exported"] = sorted(exported & {*FUNCTIONS, *CONSTANTS})
    return found


def _definition(path: Path, name: str) -> Any:
    tree = ast.parse(path.read_text())
    return next(node for node in tree.body if getattr(node, "name", None) == name)


def signature(entry: dict[str, dict[str, bool]]) -> inspect.Signature:
    """A signature from a snapshot's entry, whose values say what is required."""
    kinds = {
        "positional": inspect.Parameter.POSITIONAL_OR_KEYWORD,
        "keyword_only": inspect.Parameter.KEYWORD_ONLY,
    }
    return inspect.Signature(
        [
            inspect.Parameter(
                name, kinds[kind], default=inspect.Parameter.empty if required else None
            )
            for kind, names in entry.items()
            for name, required in names.items()
        ]
    )


if __name__ == "__main__":
    snapshot = {"version": sys.argv[2], **read(Path(sys.argv[1]))}
    SNAPSHOT.write_text(json.dumps(snapshot, indent=1) + "\n")
