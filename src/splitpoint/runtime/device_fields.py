"""Which device a model is on, and which fields of a configuration are for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.signature import Signature
from ..config import NOT_AUTOTUNED, OWN_KERNELS, Config
from ..errors import UnsupportedOnDevice
from ..kernels.devices import Device, common_device, device_row
from ..ranges import Range


def device_of(module: Callable[..., Any], signature: Signature) -> torch.device:
    """Where the arguments of a call are.

    Raises:
        MixedDevices: when they are not on one device, or all that the module has is on another.
    """
    device = common_device((leaf.path, leaf.device) for leaf in signature.tensors)
    if isinstance(module, torch.nn.Module):
        held = {name: each.device for name, each in [*_held(module)]}
        if held and device not in held.values():
            name, other = next(iter(held.items()))
            common_device([(signature.tensors[0].path, device), (f"the model's {name}", other)])
    return device


def _held(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def graph_device(signature: Signature, bound: Sequence[torch.Tensor]) -> torch.device:
    """Where the tensors of a captured graph are.

    Raises:
        MixedDevices: when they are not on one device.
    """
    arguments = [(leaf.path, leaf.device) for leaf in signature.tensors]
    held = [
        (f"a {str(each.dtype).removeprefix('torch.')}{list(each.shape)} that the model reads", each)
        for each in bound
    ]
    return common_device([*arguments, *((name, each.device) for name, each in held)])


@dataclass(frozen=True)
class Needs:
    """What a field that asks for something needs of a device."""

    asks: Callable[[Config], bool]
    has: Callable[[Device], bool]
    what: str
    instead: str


def _names(given: str | Mapping[str, str], wanted: Iterable[str]) -> bool:
    return not isinstance(given, str) and not set(wanted).isdisjoint(given.values())


NEEDS: Mapping[str, Needs] = {
    "linear": Needs(
        lambda config: _names(config.linear, OWN_KERNELS),
        lambda device: device.own_kernels,
        "kernels for linear layers",
        "'auto', 'inductor' or, where Inductor has something to choose among, 'autotuned'",
    ),
    "attention": Needs(
        lambda config: _names(config.attention, ("rowwise", "blockwise")),
        lambda device: device.own_kernels,
        "kernels for attention",
        "'auto' or 'torch'",
    ),
    "activations": Needs(
        lambda config: config.activations is not None,
        lambda device: device.own_kernels,
        "kernels that round activations",
        "None",
    ),
    "batch_invariant": Needs(
        lambda config: config.batch_invariant,
        lambda device: device.own_kernels,
        "kernels that add in one order at all sizes",
        "False",
    ),
    "free_original_weights": Needs(
        lambda config: config.free_original_weights,
        lambda device: device.own_kernels,
        "packed copies of weights",
        "False",
    ),
    "mmap_packed_weights": Needs(
        lambda config: config.mmap_packed_weights,
        lambda device: device.own_kernels,
        "packed copies of weights",
        "False",
    ),
    "cudagraph_capture_sizes": Needs(
        lambda config: bool(config.cudagraph_capture_sizes),
        lambda device: device.graphs is not None,
        "graphs to record",
        "None, and name sizes that are to be static in compile_sizes",
    ),
    "pad_to_captured": Needs(
        lambda config: config.pad_to_captured,
        lambda device: device.graphs is not None,
        "graphs to record",
        "False",
    ),
}
"""By field: what it needs where it asks for something."""


def _autotuned(config: Config) -> bool:
    return _names(config.linear, ("autotuned",))


def refuse_on(config: Config, device: torch.device) -> None:
    """Refuse what a device does not have.

    Raises:
        UnsupportedOnDevice: for the first field that asks for it.
    """
    row = device_row(device)
    for name, needs in NEEDS.items():
        if needs.asks(config) and not needs.has(row):
            raise UnsupportedOnDevice(
                f"{name}={_shown(getattr(config, name))} asks for {needs.what}, which there are "
                f"not on {device.type}\n"
                f"expected {needs.instead}"
            )
    if _autotuned(config) and not row.autotuned:
        raise UnsupportedOnDevice(
            f"linear={_shown(config.linear)} asks Inductor to choose among its GEMMs, of which "
            f"there is one on {device.type}\nexpected 'auto', 'inductor' or a kernel for it"
        )


def _shown(value: object) -> str:
    return repr(dict(value) if isinstance(value, Mapping) else value)


def notes_on(config: Config, device: torch.device, ranges: Iterable[Range]) -> list[str]:
    """What a plan of these ranges says of a configuration on a device."""
    planned = config.plan()
    before = config.unused_keys(each.range for each in planned.entries)
    notes = [note for note in planned.notes if note not in before]
    notes += config.unused_keys(ranges)
    if device_row(device).autotuned:
        notes = [note for note in notes if note != NOT_AUTOTUNED]
    return notes
