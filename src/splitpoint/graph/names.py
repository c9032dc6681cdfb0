"""The operators that a graph is split at, by all names that it may have them under."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UnknownSplittingOp
from ..torch_internals.operators import operator_aliases


def splitting_names(names: Sequence[str]) -> frozenset[str]:
    """All names under which a graph may hold the operators named.

    Raises:
        UnknownSplittingOp: for one that is not registered.
    """
    found: set[str] = set()
    for name in names:
        try:
            found |= operator_aliases(name)
        except LookupError:
            raise UnknownSplittingOp(
                f"splitting_ops names {name!r}, which no operator is registered as: write it as "
                f"'namespace::name', and import the module that registers it first"
            ) from None
    return frozenset(found)
