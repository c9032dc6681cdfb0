"""Which kernel each layer of a model was given, noted where vLLM makes the keys of its caches from.

What Dynamo captures of a layer depends on it, and vLLM drops the guards that would say so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

KEY = "splitpoint kernels"
"""Of `additional_config`; a list with a digest for each model that was loaded."""


def note(vllm_config: Any, kernels: Sequence[str]) -> None:
    """Note the kernels of a model's layers, in order."""
    if vllm_config is None or not isinstance(vllm_config.additional_config, dict):
        return
    digest = hashlib.sha256("\n".join(kernels).encode()).hexdigest()[:16]
    vllm_config.additional_config.setdefault(KEY, []).append(digest)


def chosen(vllm_config: Any) -> list[str] | None:
    """What was noted so far; None where there is no place for it."""
    if not isinstance(vllm_config.additional_config, dict):
        return None
    return list(vllm_config.additional_config.get(KEY, ()))
