"""Kernels that Inductor wrote in Triton: as text with the binaries made of it, and back.

Loading has not been run on hardware.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .probe import fits

ALIGNED = 16
"""Bytes that Triton kernels assume tensors to start at a multiple of, as Inductor has them."""


@dataclass(frozen=True)
class Binary:
    """A file that Triton made of a kernel."""

    kernel: str
    """Triton's own hash of it."""
    device: int
    name: str
    """Of the file."""
    data: bytes


def binaries_of(graph: Any) -> tuple[Binary, ...]:
    """What Triton made of the kernels of a compiled graph of Inductor's."""
    if not fits("Triton kernels"):
        return ()
    bundle = getattr(graph, "_triton_bundle", None)
    return tuple(
        Binary(str(kernel.kernel_hash), int(kernel.device), str(file.filename), bytes(file.payload))
        for kernel in (bundle.kernel_artifacts if bundle is not None else ())
        for file in kernel.artifacts
    )


def put_binaries(binaries: Sequence[Binary]) -> None:
    """Put binaries where Triton looks for them before it compiles.

    Raises:
        ValueError: for names that lead elsewhere.
        LookupError: where this version of torch has no means.
    """
    if not fits("Triton kernels"):
        raise LookupError("this version of torch puts no binaries of Triton's anywhere")
    from torch._inductor.triton_bundler import (
        TritonBundle,
        TritonBundler,
        TritonKernelArtifact,
        TritonKernelArtifacts,
    )

    by_kernel: dict[tuple[str, int], list[Any]] = {}
    for each in binaries:
        for name in (each.kernel, each.name):
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise ValueError(f"{name!r} is not the name of a file")
        files = by_kernel.setdefault((each.kernel, each.device), [])
        files.append(TritonKernelArtifact(each.name, each.data))
    made = [TritonKernelArtifacts(*key, files) for key, files in by_kernel.items()]
    TritonBundler.read_and_emit(TritonBundle(made, []))


def load_triton_kernel(name: str, source: str, device: str) -> Any:
    """A kernel from its text, whose method `run` launches it. Nothing is compiled where
    `put_binaries` had what Triton made of it.

    Raises:
        LookupError: where this version of torch has no means.
    """
    if not fits("Triton kernels"):
        raise LookupError("this version of torch loads no kernels of Triton's")
    import torch._inductor.config as config
    from torch._inductor.async_compile import AsyncCompile

    with config.patch(compile_threads=1):  # for one there is no need of processes
        made = AsyncCompile().triton(name, source, device_str=device)
    wait: Callable[[], Any] | None = getattr(made, "result", None)
    return made if wait is None else wait()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, laid out alike, that starts where Triton kernels assume it."""
    if tensor.data_ptr() % ALIGNED == 0 or not tensor.numel():
        return tensor
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((length - 1) * step for length, step in steps)
    copy = tensor.as_strided((extent,), (1,)).clone()
    return copy.as_strided(tensor.shape, tensor.stride())


def raw_stream(device: int) -> int:
    """The address of a device's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)
