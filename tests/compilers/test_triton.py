"""Pieces on CUDA: Inductor's code for them is read, kept and compiled to machine code. Needs a CUDA
build of torch, and no GPU: nothing is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitpoint import Config
from splitpoint.capture.capture import capture
from splitpoint.capture.signature import Signature
from splitpoint.compilers import artifact
from splitpoint.compilers.inductor import Compiled, compile_piece
from splitpoint.compilers.wrapper import Wrapper
from splitpoint.graph.pieces import Piece, split
from splitpoint.passes.linear_sites import find
from splitpoint.passes.noop import NoopElimination
from splitpoint.ranges import Range
from splitpoint.store.store import Store
from splitpoint.torch_internals.triton_kernels import Binary
from tests import no_gpu

# What torch is told of a GPU, and what it writes for one, differ between versions.
needs_cuda_build = pytest.mark.skipif(
    not no_gpu.is_possible() or torch.__version__ >= (2, 12),
    reason="needs a CUDA build of torch 2.11 with Triton, and no GPU",
)

WIDTH = 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + F.silu(gate) * up


def piece_on(device: str) -> Piece:
    """The one piece of a layer, as if its tensors were on a device."""
    layer, x = Layer().bfloat16().requires_grad_(False), torch.zeros(4, WIDTH).bfloat16()
    captured = capture(layer, Signature(layer.forward, (x,), {}, None), (4,))
    parts = split(captured.graph_module, (), captured.symbols)
    (piece,) = parts.pieces.values()
    return replace(piece, values=tuple(_moved(value, device) for value in piece.values))


def _moved(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=torch.device(device, 0)
        )


def test_our_kernels_find_nothing_on_cuda():
    bound = frozenset(range(3))
    assert len(list(find(piece_on("cpu"), bound))) == 1
    assert list(find(piece_on("cuda"), bound)) == []


def compiled(range_: Range) -> tuple[Compiled, dict[str, str]]:
    piece = piece_on("cuda")
    options = {"triton.autotune_at_compile_time": False}
    planned = Config(inductor_options=options).planned(range_)
    with no_gpu.no_gpu() as kernels:
        return compile_piece(piece, planned, [NoopElimination()]), dict(kernels)


@needs_cuda_build
@pytest.mark.parametrize("range_", [Range(1, 1), Range(2, 64)], ids=str)
def test_the_code_around_triton_kernels_is_read(range_: Range):
    made, kernels = compiled(range_)
    assert made.bare is not None
    assert made.steps is None  # the runner in C++ has no step for it
    wrapper = made.bare.wrapper
    assert set(wrapper.triton) == set(kernels) != set()
    assert {each.source for each in wrapper.triton.values()} == set(kernels.values())
    assert "with cuda_device(0):" in wrapper.source
    assert ".run(" in wrapper.source
    assert "aligned(" in wrapper.source


@needs_cuda_build
def test_bounds_of_a_range_reach_the_kernels():
    (static, _), (dynamic, _) = compiled(Range(1, 1)), compiled(Range(2, 64))
    assert static.bare is not None
    assert dynamic.bare is not None
    assert static.bare.wrapper.source != dynamic.bare.wrapper.source
    assert static.assumptions == ()


@needs_cuda_build
def test_triton_compiles_the_kernels_for_an_h100():
    _, kernels = compiled(Range(2, 64))
    for name, source in kernels.items():
        with no_gpu.no_gpu():
            found = no_gpu.machine_code(name, source)
        assert ".target sm_90" in found["ptx"]
        assert found["cubin"][:4] == b"\x7fELF"


# --- keeping; what Triton made are any files -------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


SOURCE = "def call(a):\n    kernel.run(a)\n    return (a,)\n"
BINARIES = (Binary("HASH", 0, "kernel.cubin", b"\x7fELF"), Binary("HASH", 0, "kernel.json", b"{}"))


def keep(store: Store, binaries: tuple[Binary, ...] = BINARIES) -> bool:
    from splitpoint.compilers.wrapper import TritonSource

    wrapper = Wrapper(SOURCE, ("kernel",), {}, {"kernel": TritonSource("fused", "text", "cuda")})
    facts = {"assumptions": [], "matches": [], "steps": None, "serves": []}
    return artifact.keep(store, "k" * 64, {}, wrapper, {"kernel": object()}, facts, binaries)


def test_text_and_binaries_are_kept_and_come_back(store: Store, monkeypatch: pytest.MonkeyPatch):
    """What comes back is what was kept; Triton itself is not here to launch it."""
    got: list[Any] = []
    monkeypatch.setattr(artifact, "put_binaries", lambda given: got.append(tuple(given)))

    class Kernel:
        def __init__(self, *given: str) -> None:
            got.append(given)

        def run(self, tensor: Tensor) -> None:
            tensor.add_(1)

    monkeypatch.setattr(artifact, "load_triton_kernel", Kernel)
    assert keep(store)
    found = artifact.load(store, "k" * 64, artifact.Libraries())
    assert found is not None
    assert got == [BINARIES, ("fused", "text", "cuda")]
    (result,) = found.call(torch.zeros(2))
    assert result.tolist() == [1, 1]


def test_without_binaries_nothing_is_kept(store: Store):
    assert not keep(store, ())


@pytest.mark.parametrize("index", range(3))
def test_a_missing_object_is_a_miss(store: Store, index: int):
    assert keep(store)
    entry = store.read("pieces", "k" * 64)
    assert entry is not None
    assert len(entry["objects"]) == 3
    store.object_path(entry["objects"][index]).unlink()
    assert artifact.load(store, "k" * 64, artifact.Libraries()) is None


@pytest.mark.parametrize("name", ["../kernel.cubin", "", ".."])
def test_files_lead_nowhere_else(store: Store, name: str):
    assert keep(store, (Binary("HASH", 0, name, b""),))
    assert artifact.load(store, "k" * 64, artifact.Libraries()) is None
