"""The machine and the software: what a figure was measured on, and what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from .. import kernels
from ..errors import KernelBuildError
from ..kernels import build
from ..ranges import align
from ..store.store import Store
from ..torch_internals import probe
from ..torch_internals.names import CHECKED, USES
from ..torch_internals.toolchain import cpp_compiler

PACKAGES = ("transformers", "safetensors", "torchao", "vllm", "triton", "numpy")
"""Packages that are named where they are installed."""


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """Versions and machine, ready for JSON."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
    }


def software(store: Store | None, version: str, all_names: bool = False) -> str:
    """What a bug report needs: versions, CPU and instruction sets, compiler, kernel library,
    store, and which uses of private names of torch are active; with `all_names` each name."""
    facts = [
        ("splitpoint", f"{version}, {Path(__file__).parents[1]}"),
        ("torch", f"{torch.__version__} (checked: {', '.join(CHECKED)})"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("packages", _packages()),
        ("CPU", f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("vectors", torch.backends.cpu.get_cpu_capability()),
        ("C++ compiler", _compiler()),
        ("kernels", _kernels()),
        ("store", _store(store)),
    ]
    rows = [("private names of torch", "kind", "state", "what is done without")]
    for use in USES:
        state = probe.state_of(use)
        rows.append((use.key, use.kind, state, "" if state == "active" else use.without))
    lines = [*align([("", ""), *facts])[1:], "", *align(rows)]
    if all_names:
        for use in USES:
            lines += ["", f"{use.key} ({use.kind}): to {use.purpose}.", f"Without: {use.without}."]
            lines += [f"  {name}  {probe.misfit(name) or ''}".rstrip() for name in use.entries]
    return "\n".join(lines)


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "none of " + ", ".join(PACKAGES)


def _compiler() -> str:
    path = cpp_compiler()
    if path is None:
        return "none found: install g++ 12 or later, or set CXX"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return f"{path}: {(done.stdout or done.stderr).strip().partition(chr(10))[0]}"


def _kernels() -> str:
    """The kernel library, without building it."""
    try:
        path = build.place()
        if not path.exists():
            return f"not built yet: the first model that is compiled builds {path}"
        return f"{path}: {', '.join(kernels.instruction_sets())}"
    except KernelBuildError as error:
        return f"none: {error}"


def _store(store: Store | None) -> str:
    if store is None:
        return "none"
    entries = list(store.entries())
    size = sum(path.stat().st_size for _, _, path in entries)
    size += sum(path.stat().st_size for path in store.objects())
    return f"{store.folder}: {len(entries)} entries, {size / 2**20:.1f} MiB"
