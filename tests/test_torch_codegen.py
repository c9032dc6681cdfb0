"""What Inductor's code generation is spared."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest

from splitpoint._torch_codegen import dtype_rules_made_once


def table(rules: Any) -> dict[str, Any]:
    return {
        name: (rule.func, rule.keywords) if isinstance(rule, functools.partial) else rule
        for name, rule in vars(rules).items()
    }


def test_the_table_of_dtypes_is_the_same_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch._inductor.compile_fx")  # fills in what rules are made from
    from torch._inductor import utils
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler as Rules

    asked: list[None] = []
    boolean_ops = utils.boolean_ops
    monkeypatch.setattr(utils, "boolean_ops", lambda: asked.append(None) or boolean_ops())
    monkeypatch.setattr(Rules, "_instance", None)
    expected = table(Rules())
    monkeypatch.setattr(Rules, "_instance", None)
    asked.clear()
    with dtype_rules_made_once():
        made = [Rules() for _ in range(3)]
    assert len(asked) == 1
    assert made[0] is made[1] is made[2]
    assert table(made[0]) == expected
    Rules()
    assert len(asked) == 2
