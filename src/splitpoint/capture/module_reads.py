"""What is read of a module, sorted once for all modules of a kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .reads import HOOKS_OF, Reads


@dataclass(frozen=True)
class ModuleReads:
    """The expressions over one module `m` that a `Reads` is asked of, for many modules."""

    hooks: tuple[str, ...]
    """Dicts of the module of which the length is asked."""
    by_type: tuple[str, ...]
    """Expressions whose values, and what they read but the type itself, follow from `type(m)`."""
    rest: tuple[str, ...]

    @classmethod
    def of(cls, codes: Iterable[str]) -> ModuleReads:
        """Sort expressions."""
        hooks: list[str] = []
        by_type: list[str] = []
        rest: list[str] = []
        for code in codes:
            match = HOOKS_OF.fullmatch(code)
            if match and match[1] == "m":
                hooks.append(match[2])
            elif "type(m)" in code and not _MODULE.search(code.replace("type(m)", "")):
                by_type.append(code)
            else:
                rest.append(code)
        return cls(tuple(hooks), tuple(by_type), tuple(rest))

    def unseen(
        self,
        reads: Reads,
        module: torch.nn.Module,
        names: Mapping[str, Any],
        seen: dict[tuple[str, type], bool],
    ) -> list[str]:
        """Let `reads` note what the expressions read, and return those that it cannot see.

        Args:
            names: as for `Reads.sees`; the module among them.
            seen: what was found of types before. For one `Reads`.
        """
        kind = type(module)
        for code in self.by_type:
            if (code, kind) not in seen:
                seen[code, kind] = reads.sees(code, names)
        if self.by_type:
            reads.sees_type(module)
        left = [code for code in self.by_type if not seen[code, kind]]
        if not reads.sees_hooks(module, self.hooks):
            left += [f"len(m.{name})" for name in self.hooks]
        return left + [code for code in self.rest if not reads.sees(code, names)]


_MODULE = re.compile(r"\bm\b")
