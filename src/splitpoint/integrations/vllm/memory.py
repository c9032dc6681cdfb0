"""How much memory there is for second copies of weights."""

from __future__ import annotations

from pathlib import Path

from . import names

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

SHARE = 0.5
"""Of what is available once the KV cache has its part, the rest being for activations."""


def spare_bytes() -> int:
    """Bytes that copies of weights may take."""
    config = names.CONFIG.value()
    reserved = config.cache_config.kv_cache_memory_bytes if config is not None else None
    return max(0, int(SHARE * (available_bytes() - (reserved or 0))))


def available_bytes() -> int:
    """Bytes that the process can still have: of the machine's, or of its container's."""
    available = 0
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            available = int(rest.split()[0]) * 1024
    try:
        most = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:  # no container, or an older kind of control group
        return available
    return available if most == "max" else min(available, int(most) - used)
