"""See that a checkpoint had all of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelNotFound


def check_whole(path: str, found: Mapping[str, Any]) -> None:
    """See that a checkpoint had all that its model has, as `from_pretrained` tells: what it had not
    is random.

    Raises:
        ModelNotFound: when it had not.
    """
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelNotFound(
            f"{path} has no weights for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}, under the names that this model has: "
            f"load a checkpoint that is whole"
        )
