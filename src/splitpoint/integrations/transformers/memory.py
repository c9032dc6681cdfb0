"""How many tokens the cache of a model holds unless something else is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SHARE = 0.25
"""Of the memory of the machine, or of its container."""

MOST_TOKENS = 1 << 20

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def default_cache_tokens(model: Any) -> int:
    """A power of two, so that starts on one machine agree: a store is keyed by it."""
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    bytes_each = 2 * text.num_hidden_layers * kv_heads * size * model.dtype.itemsize
    room = max(1, int(SHARE * total_bytes()) // bytes_each)
    tokens: int = 1 << (room.bit_length() - 1)
    return min(MOST_TOKENS, tokens)


def total_bytes() -> int:
    """Bytes of memory that the machine has, or that its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        most = _CGROUP.read_text().strip()
    except OSError:  # no container, or an older kind of control group
        return total
    return total if most == "max" else min(total, int(most))
