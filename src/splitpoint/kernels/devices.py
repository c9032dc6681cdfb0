"""What applies to models on which kind of device: one table, asked wherever devices differ."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import MixedDevices
from .device_graphs import CudaGraphs, GraphDevice

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Device:
    """What applies to models whose tensors are on one kind of device.

    The defaults are those of a device that nothing is known of: what Inductor makes is called
    through its own wrappers, from Python, and is not kept in a store.
    """

    type: str
    """As in `torch.device`."""
    own_kernels: bool = False
    """This package's linear layers and attention, over packed weights, whose originals can be
    freed."""
    native_runner: bool = False
    """The runner in C++."""
    shares_compiles: bool = False
    """One compile for several ranges: what Inductor's code generator for this device asks about
    the size is noted (`torch_internals.questions`)."""
    autotuned: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's options for `linear="autotuned"`; none where it has nothing to choose among."""
    graphs: Callable[[torch.device], GraphDevice] | None = None
    """What records a function's kernels, to be replayed."""
    identity: Callable[[torch.device], Mapping[str, str]] | None = None
    """What a store's keys have to tell apart beside the processor; None: nothing is kept."""
    settings: Callable[[], tuple[Any, ...]] = tuple
    """Settings of torch that compiled code leans on, beside `torch_internals.state`."""


def _cuda_identity(device: torch.device) -> dict[str, str]:
    found = torch.cuda.get_device_properties(device)
    return {
        "device": f"{found.name} sm_{found.major}{found.minor} "
        f"{found.multi_processor_count} multiprocessors",
        "driver": f"CUDA {torch.version.cuda} {cuda_driver()}",
    }


def _cuda_settings() -> tuple[Any, ...]:
    # Inductor's templates have the precision of products built in.
    return (
        torch.is_autocast_enabled("cuda"),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )


@functools.cache
def cuda_driver() -> str:
    """The version of NVIDIA's driver, as the kernel module or else nvidia-smi says it."""
    try:
        return " ".join(_DRIVER.read_text().partition("\n")[0].split())
    except OSError:
        pass
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "driver unknown"
    return f"driver {done.stdout.strip().partition(chr(10))[0] or 'unknown'}"


DEVICES: dict[str, Device] = {
    "cpu": Device(
        "cpu",
        own_kernels=True,
        native_runner=True,
        shares_compiles=True,
        identity=lambda device: {},  # the processor is in every key
    ),
    "cuda": Device(
        "cuda",
        autotuned={"max_autotune": True},
        graphs=CudaGraphs,
        identity=_cuda_identity,
        settings=_cuda_settings,
    ),
}
"""By type. One that is not here has the defaults of `Device`."""

CPU = torch.device("cpu")


def device_row(device: torch.device | str) -> Device:
    """The table's row for a device."""
    type_ = device if isinstance(device, str) else device.type
    return DEVICES.get(type_) or Device(type_)


def common_device(tensors: Iterable[tuple[str, torch.device]]) -> torch.device:
    """The one device that named tensors are on; the CPU where there are none.

    Raises:
        MixedDevices: when there are several.
    """
    first: dict[torch.device, str] = {}
    for name, device in tensors:
        first.setdefault(device, name)
    if len(first) > 1:
        (one, name), (other, other_name) = list(first.items())[:2]
        raise MixedDevices(
            f"{name} is on {one} but {other_name} on {other}\n"
            f"expected the arguments, and all that the model reads, on one device\n"
            f"move them: model.to({str(one)!r}), tensor.to({str(one)!r})"
        )
    return next(iter(first), CPU)
