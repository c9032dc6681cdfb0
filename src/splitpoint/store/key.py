"""What a compiled artifact depends on, as fields that hash to its key.

All that changes the code is in, nothing else is: no path, process, user, rank or order.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..capture.code import short
from ..kernels.devices import CPU, device_row
from ..torch_internals.state import changed_inductor_config, torch_state

if TYPE_CHECKING:
    from ..graph.pieces import Piece
    from ..ranges import PlannedRange

FORMAT = 2
"""Counts up when what is stored changes its meaning."""

_NO_PART = frozenset(
    ("__main__.py", "bench", "cli", "errors.py", "integrations", "report", "__pycache__")
)
"""What of this package has no say in what is stored: commands, what they print, and messages.
All the rest may have one, so its source is in every key."""

_NO_EFFECT = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_MAX_JOBS")
"""Environment variables of Inductor's that do not change code."""

Fields = Mapping[str, str]


def digest(fields: Fields) -> str:
    """The key of some fields: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()


class NoIdentity(Exception):
    """A device whose keys would not tell what has to be told apart; says which."""


def environment(device: torch.device = CPU) -> dict[str, str]:
    """What code depends on beside what is compiled: software, processor, torch's settings, and of
    an accelerator its model, capability and driver.

    Raises:
        NoIdentity: for a device of which that is not known.
    """
    row = device_row(device)
    if row.identity is None:
        raise NoIdentity(f"tensors on {device.type}")
    return {
        **_software(),
        **row.identity(device),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch_state": json.dumps(torch_state()),
        "inductor_config": _inductor_config(),
    }


def piece_fields(
    piece: Piece,
    description: str,
    planned: Sequence[PlannedRange],
    passes: str,
    options: Mapping[str, Any],
    trusted: Sequence[int],
) -> dict[str, str]:
    """The fields of a compiled piece.

    Args:
        piece: what is compiled.
        description: what it computes (`graph.pieces.describe`).
        planned: the line of the plan that it is compiled for: range, hint and options. After it,
            where it was made for several, these.
        passes: what identifies the passes and their settings.
        options: further Inductor options.
        trusted: inputs that are not checked by the compiled code.
    """
    tensors = [value for value in piece.values if isinstance(value, torch.Tensor)]
    return {
        **environment(tensors[0].device if tensors else CPU),
        "piece": short(description),
        "takes": str(piece.takes),
        "lengths": " ".join(str(each.lengths) for each in planned if each.lengths),
        "range": " ".join(str(each.range) for each in planned),
        "hint": " ".join(str(each.hint) for each in planned),
        "passes": passes,
        "options": json.dumps({**planned[0].options, **options}, sort_keys=True, default=repr),
        "unchecked_inputs": str(sorted(trusted)),
    }


def packing_environment() -> dict[str, str]:
    """What a weight in another layout depends on beside its values: of `environment` all but what
    is about compiling, and how arithmetic treats what is nearly nothing."""
    found = environment()
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return {
        **{name: found[name] for name in found if name not in ("threads", "inductor_config")},
        "flushes_denormals": str(not smallest / 2),
    }


@functools.cache
def _software() -> dict[str, str]:
    package = Path(__file__).parent.parent
    own = hashlib.sha256()
    for name, path in _sources(str(package), ""):
        with open(path, "rb", buffering=0) as file:
            source = file.read()
        own.update(f"{name} {len(source)}\n".encode() + source)
    return {
        "format": str(FORMAT),
        "splitpoint": own.hexdigest()[:16],
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "python": f"{sys.implementation.name} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()} {platform.libc_ver()[0]}",
    }


def _sources(folder: str, inside: str) -> Iterator[tuple[str, str]]:
    """(name from the package's folder, path) of each file that has a part, in order of names."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=attrgetter("name"))
    for entry in found:
        if entry.name in _NO_PART and (not inside or entry.name == "__pycache__"):
            continue
        if entry.is_dir():
            yield from _sources(entry.path, f"{inside}{entry.name}/")
        else:
            yield f"{inside}{entry.name}", entry.path


@functools.cache
def _processor() -> str:
    """The instruction sets: kernels are compiled for those that the processor has."""
    found = torch.backends.cpu.get_cpu_capability()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{found} {platform.processor()}"
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            flags = sorted(set(line.partition(":")[2].split()))
            return f"{found} {short(' '.join(flags))}"
    return f"{found} {platform.processor()}"


def _inductor_config() -> str:
    """Inductor's settings that are not the default ones."""
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("TORCHINDUCTOR_") and name not in _NO_EFFECT
    }
    return json.dumps([found, changed_inductor_config()], default=repr)
