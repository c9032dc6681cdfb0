"""What a forward pass cannot do without: reading the weights, and the arithmetic on them.

The floor of a pass is the sum over its linear layers of the longer of two times: reading the
layer's weight once, at the bandwidth of memory, and its multiply-adds, at the highest rate that
was seen here: in registers alone, or in a library's GEMM on a large square layer; plus reading the
other weights once. Layers follow each other, so their floors add up. Attention, norms and
activations are left out, so the floor is lower than what any implementation can reach, the more so
the longer the text. A model that stays in the caches can be under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.memory import streamed_bytes
from ..kernels.packed_linear import PackedLinear
from ..torch_internals.onednn import prepacked_linear
from ..tuning.measure import Timing
from .inputs import last_logits, random_ids
from .linear import COLD_BYTES

ROWS, SIDE = 512, 2048
"""Rows of x, and both sides of the weight, of the GEMM whose rate is taken for the peak: as
fast as larger ones, and short enough to take turns."""

REGISTER_OPERATIONS = 10**8
"""Operations in registers that are timed at a time, at least."""

LAYERS = (nn.Linear, PackedLinear)
"""Linear layers."""

READ, GEMM, REGISTERS = "read memory", "gemm", "registers"
"""Names of what is timed in turn with the forward passes."""


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do."""

    bytes_s: float
    """Bytes a second read from memory."""
    flops_s: float
    """Floating-point operations a second at the most (a multiply-add is two)."""


@dataclass(frozen=True)
class Layer:
    """One linear layer of a pass."""

    n: int
    k: int
    """Its weight is [n, k]."""
    weight_bytes: int
    """Bytes of its weight, as it lies in memory."""
    rows: int
    """Rows of its input."""

    @property
    def flops(self) -> int:
        """Operations, a multiply-add as two."""
        return 2 * self.rows * self.n * self.k


@dataclass(frozen=True)
class Work:
    """The layers of one forward pass, and the weights beside them."""

    layers: tuple[Layer, ...]
    other_bytes: int
    """Bytes of parameters that are neither in linear layers nor in embeddings."""

    def floor_s(self, rates: Rates) -> float:
        """Seconds that the pass takes at the least (see the head of this file)."""
        linear = sum(
            max(layer.weight_bytes / rates.bytes_s, layer.flops / rates.flops_s)
            for layer in self.layers
        )
        return linear + self.other_bytes / rates.bytes_s


def work_of(model: Any, size: int) -> Work:
    """What a forward pass of a causal language model does at a size, seen by running it."""
    layers: list[Layer] = []

    def note(module: nn.Linear | PackedLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        n, k = module.out_features, module.in_features
        held = module.packed if isinstance(module, PackedLinear) else module.weight
        layers.append(Layer(n, k, held.nbytes, args[0].numel() // k))

    modules = list(model.modules())
    hooks = [m.register_forward_hook(note) for m in modules if isinstance(m, LAYERS)]
    try:
        last_logits(model)(random_ids(model.config.vocab_size, size))
    finally:
        for hook in hooks:
            hook.remove()
    counted = {
        id(p) for m in modules if isinstance(m, (*LAYERS, nn.Embedding)) for p in m.parameters()
    }
    others = sum(p.nbytes for p in model.parameters() if id(p) not in counted)
    return Work(tuple(layers), others)


class Probes:
    """The measurements that a floor needs, to be timed in turn with what it is for."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Takes 128 MiB.

        Raises:
            KernelBuildError: when the kernels, of which reading memory is one, cannot be built.
        """
        kernels.load()
        # On huge pages, as packed weights are: others are read more slowly.
        self._data = streamed_bytes(COLD_BYTES).fill_(1)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SIDE, SIDE, generator=generator).to(dtype)
        self._x = torch.randn(ROWS, SIDE, generator=generator).to(dtype)
        self._gemm = prepacked_linear(weight) or (lambda x: F.linear(x, weight))
        self._bf16 = dtype == torch.bfloat16
        self._steps = 1
        while self._multiply() < REGISTER_OPERATIONS:
            self._steps *= 2

    @property
    def read_bytes(self) -> int:
        """Bytes that a call of `READ` reads."""
        return self._data.nbytes

    def calls(self) -> dict[str, Callable[[], object]]:
        """What is to be timed, by name."""
        return {
            READ: lambda: torch.ops.splitpoint.read_memory(self._data),
            GEMM: lambda: self._gemm(self._x),
            REGISTERS: self._multiply,
        }

    def rates(self, timings: Mapping[str, Timing]) -> Rates:
        """What the medians of the calls' timings come to."""
        return Rates(
            bytes_s=self._data.nbytes / timings[READ].median_s,
            flops_s=max(
                2 * ROWS * SIDE * SIDE / timings[GEMM].median_s,
                self._multiply() / timings[REGISTERS].median_s,
            ),
        )

    def _multiply(self) -> int:
        """Multiplies in registers; how many operations that were."""
        done: int = torch.ops.splitpoint.multiply_registers(self._bf16, self._steps)
        return done
