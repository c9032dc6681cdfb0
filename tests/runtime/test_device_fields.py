"""Devices: what they do not have is refused by name, mixed ones too, and rows decide the rest.

CUDA tensors are fake ones, or none: nothing here runs on a GPU.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from splitpoint import Config, compile
from splitpoint.capture.signature import Signature
from splitpoint.errors import MixedDevices, SplitpointError, UnsupportedOnDevice
from splitpoint.kernels import devices
from splitpoint.kernels.devices import CPU, DEVICES, common_device, device_row
from splitpoint.runtime.device_fields import NEEDS, graph_device, notes_on, refuse_on

CUDA = torch.device("cuda", 0)

ASKED: dict[str, Config] = {
    "linear": Config(linear={"1-8": "packed"}),
    "attention": Config(attention={"1-8": "rowwise"}),
    "activations": Config(activations="int8"),
    "batch_invariant": Config(batch_invariant=True),
    "free_original_weights": Config(free_original_weights=True),
    "mmap_packed_weights": Config(mmap_packed_weights=True),
    "cudagraph_capture_sizes": Config(cudagraph_capture_sizes=[1, 2]),
    "pad_to_captured": Config(pad_to_captured=True),
}


def test_the_table_names_every_field_that_needs_something():
    assert set(ASKED) == set(NEEDS)


@pytest.mark.parametrize("field", ASKED)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_a_field_is_taken_where_the_device_has_it_and_else_refused(field: str, device: str):
    if NEEDS[field].has(device_row(device)):
        refuse_on(ASKED[field], torch.device(device))
        return
    with pytest.raises(UnsupportedOnDevice) as error:
        refuse_on(ASKED[field], torch.device(device))
    assert_told(error.value, field, device)


def assert_told(error: SplitpointError, *what: str) -> None:
    assert len(str(error).splitlines()) <= 3
    for each in what:
        assert each in str(error)


def test_defaults_are_refused_nowhere():
    for device in ("cpu", "cuda", "meta"):
        refuse_on(Config(compile_sizes=[1]), torch.device(device))


def test_autotuned_is_for_devices_with_something_to_choose():
    asked = Config(linear={"1-8": "autotuned"})
    refuse_on(asked, CUDA)
    with pytest.raises(UnsupportedOnDevice) as error:
        refuse_on(asked, CPU)
    assert_told(error.value, "autotuned", "cpu")


def test_that_static_sizes_are_not_tuned_is_said_on_cpu_alone():
    config = Config(compile_sizes=[1])
    assert any("not autotuned" in note for note in notes_on(config, CPU, []))
    assert not any("not autotuned" in note for note in notes_on(config, CUDA, []))


def test_a_call_is_refused_before_anything_is_compiled():
    model = compile(nn.Linear(4, 4), Config(linear={"1-8": "autotuned"}, cache_dir=""))
    with pytest.raises(UnsupportedOnDevice):
        model(torch.randn(2, 4))


# --- mixed devices ---------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y.shape[0]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("other", torch.zeros(4, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def call(module: nn.Module, *args: Tensor) -> Any:
    return compile(module, Config(max_size=8, backend="eager", cache_dir=""))(*args)


def test_arguments_on_two_devices_are_refused():
    with pytest.raises(MixedDevices) as error:
        call(Two(), torch.zeros(2, 4), torch.zeros(2, device="meta"))
    assert_told(error.value, "x is on cpu but y on meta", "model.to('cpu')")


def test_a_model_on_another_device_is_refused():
    with pytest.raises(MixedDevices) as error:
        call(nn.Linear(4, 4), torch.zeros(2, 4, device="meta"))
    assert_told(error.value, "input is on meta but the model's weight on cpu")


def test_what_the_model_has_but_does_not_read_may_be_anywhere():
    assert call(Table(), torch.ones(2, 4)).sum() == 8


def test_what_the_graph_reads_has_to_be_where_the_arguments_are():
    with FakeTensorMode():
        x, weight = torch.empty(2, 4, device="cuda"), torch.empty(4, 4, device="cuda")
    signature = Signature(lambda x: x, (x,), {}, None) if _is_plain(x) else _signature(CUDA)
    assert graph_device(signature, [weight]) == CUDA
    with pytest.raises(MixedDevices) as error:
        graph_device(signature, [weight, torch.zeros(3)])
    assert_told(error.value, "x is on cuda:0", "float32[3] that the model reads on cpu")


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor


def _signature(device: torch.device) -> Any:
    found = Signature(lambda x: x, (torch.zeros(2, 4),), {}, None)
    found.tensors = [dataclasses.replace(leaf, device=device) for leaf in found.tensors]
    return found


def test_no_tensors_are_on_cpu():
    assert common_device([]) == CPU
    with pytest.raises(MixedDevices):
        common_device([("x", torch.device("cuda", 0)), ("y", torch.device("cuda", 1))])


# --- what keys tell apart --------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a driver would say."""
    said = {"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**said))
    monkeypatch.setattr(devices, "cuda_driver", lambda: "580.1")
    return said


@pytest.mark.parametrize(
    ("what", "other"), [("name", "NVIDIA H200"), ("major", 10), ("multi_processor_count", 114)]
)
def test_keys_tell_gpus_apart(gpu: dict[str, Any], what: str, other: object):
    identity = DEVICES["cuda"].identity
    assert identity is not None
    before = identity(CUDA)
    gpu[what] = other
    assert identity(CUDA)["device"] != before["device"]
    assert identity(CUDA)["driver"] == before["driver"]


def test_keys_tell_drivers_apart(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    from splitpoint.store import key

    before = key.environment(CUDA)
    monkeypatch.setattr(devices, "cuda_driver", lambda: "590.2")
    after = key.environment(CUDA)
    assert {name for name in after if after[name] != before.get(name)} == {"driver"}
    assert set(after) - set(key.environment()) == {"device", "driver"}


def test_nothing_is_kept_for_devices_that_keys_do_not_know():
    from splitpoint.store import key

    with pytest.raises(key.NoIdentity, match="tensors on meta"):
        key.environment(torch.device("meta"))


def test_settings_of_cuda_are_read_without_a_gpu():
    before = DEVICES["cuda"].settings()
    assert len(before) == 4
    assert DEVICES["cpu"].settings() == ()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        pass
