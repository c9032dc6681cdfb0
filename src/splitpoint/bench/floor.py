"""What a forward pass cannot do without: reading the weights, and the arithmetic on them.

The floor of a pass is the sum over its linear layers of the longer of two times: reading the
layer's weight once, and its multiply-adds; plus reading the other weights once. Layers follow each
other, so their floors add up. Attention, norms and activations are left out, so the floor is lower
than what any implementation can reach, the more so the longer the text.

Both rates are the best that were seen in the run: by readers and multipliers that are timed in turn
with the passes, and by the passes themselves, as what was faster than a floor shows that the floor
was none. Memory is read where weights lie: on pages of the same kind, and as much of it as a pass
has weights, so that what stays in a cache does so for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import Activations, Weights
from ..integrations.transformers.rounding import HEAD
from ..kernels.int4 import int4_group
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

MOST_RAISED = 16.0
"""A rate is not taken for higher by more than this, as nothing is measured so badly."""

INT8_OF_FP32 = 4
"""Values in int8 that an instruction takes in place of one in fp32."""

LAYERS = (nn.Linear, PackedLinear)
"""Linear layers."""

READ, GEMM, REGISTERS, FP32_REGISTERS = "read memory", "gemm", "registers", "fp32 registers"
"""Names of what is timed in turn with the forward passes; the last where activations are rounded to
int8."""

LEAST_BYTES = 1 << 16
"""That are read at a time, as the call takes a while too."""


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do."""

    bytes_s: float
    """Bytes a second read from memory."""
    flops_s: float
    """Floating-point operations a second at the most (a multiply-add is two)."""

    def best_of(self, other: Rates) -> Rates:
        """The higher of each."""
        return Rates(max(self.bytes_s, other.bytes_s), max(self.flops_s, other.flops_s))

    def raised_by(self, work: Work, seconds: float) -> Rates:
        """What the machine can do at least, as a pass was seen to take no more than so many
        seconds: what most of its floor is made of is faster than was measured."""
        if work.floor_s(self) <= seconds:
            return self
        reads = work.read_s(self) > work.floor_s(self) / 2
        low, high = 1.0, 2.0

        def times(factor: float) -> Rates:
            if reads:
                return replace(self, bytes_s=factor * self.bytes_s)
            return replace(self, flops_s=factor * self.flops_s)

        while work.floor_s(times(high)) > seconds:
            low, high = high, 2 * high
            if high > MOST_RAISED:  # the rest alone takes longer: both were measured too low
                factor = work.floor_s(self) / seconds
                return Rates(factor * self.bytes_s, factor * self.flops_s)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if work.floor_s(times(middle)) > seconds else (low, middle)
        return times(high)


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

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that it reads."""
        return sum(layer.weight_bytes for layer in self.layers) + self.other_bytes

    def read_s(self, rates: Rates) -> float:
        """Seconds of the floor that are for layers whose weights take longer than their
        arithmetic, and for the other weights."""
        linear = sum(
            layer.weight_bytes / rates.bytes_s
            for layer in self.layers
            if layer.weight_bytes / rates.bytes_s > layer.flops / rates.flops_s
        )
        return linear + self.other_bytes / rates.bytes_s

    def floor_s(self, rates: Rates) -> float:
        """Seconds that the pass takes at the least (see the head of this file)."""
        linear = sum(
            max(layer.weight_bytes / rates.bytes_s, layer.flops / rates.flops_s)
            for layer in self.layers
        )
        return linear + self.other_bytes / rates.bytes_s


def work_of(model: Any, size: int, weights: Weights | None = None) -> Work:
    """What a forward pass of a causal language model does at a size, seen by running it; with its
    linear layers' weights as they are, or rounded to `weights`."""
    layers: list[Layer] = []
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None

    def note(module: nn.Linear | PackedLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        n, k = module.out_features, module.in_features
        if isinstance(module, PackedLinear):
            nbytes = module.packed.nbytes
        else:
            kind = HEAD if weights and module is head else weights
            nbytes = _rounded_bytes(n, k, module.weight, kind)
        layers.append(Layer(n, k, nbytes, args[0].numel() // k))

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


def _rounded_bytes(n: int, k: int, weight: Tensor, weights: Weights | None) -> int:
    if weights == "int8":
        return n * k + 4 * n  # a factor in float32 for each row
    group = int4_group(k)
    if weights == "int4" and group is not None:
        return n * k // 2 + n * k // group * 2  # and one in bfloat16 for each group
    return weight.nbytes


class Probes:
    """The measurements that a floor needs, to be timed in turn with what it is for."""

    def __init__(
        self,
        dtype: torch.dtype,
        read_bytes: int = COLD_BYTES,
        activations: Activations | None = None,
    ) -> None:
        """Takes as much memory as it is to read: what a pass has of weights, 128 MiB at most.

        Raises:
            KernelBuildError: when the kernels, of which reading memory is one, cannot be built.
        """
        kernels.load()
        # On huge pages, as packed weights are: others are read more slowly.
        self._data = streamed_bytes(max(LEAST_BYTES, min(COLD_BYTES, read_bytes))).fill_(1)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SIDE, SIDE, generator=generator).to(dtype)
        self._x = torch.randn(ROWS, SIDE, generator=generator).to(dtype)
        self._gemm = prepacked_linear(weight) or (lambda x: F.linear(x, weight))
        self._kinds = {REGISTERS: dtype == torch.bfloat16}
        if activations is not None:
            self._kinds[FP32_REGISTERS] = False
        self._steps: dict[str, int] = {}
        for name, bf16 in self._kinds.items():
            self._steps[name] = 1
            while _multiply(bf16, self._steps[name]) < REGISTER_OPERATIONS:
                self._steps[name] *= 2

    @property
    def read_bytes(self) -> int:
        """Bytes that a call of `READ` reads."""
        return self._data.nbytes

    def calls(self) -> dict[str, Callable[[], object]]:
        """What is to be timed, by name."""
        return {
            READ: lambda: torch.ops.splitpoint.read_memory(self._data),
            GEMM: lambda: self._gemm(self._x),
            **{
                name: functools.partial(_multiply, bf16, self._steps[name])
                for name, bf16 in self._kinds.items()
            },
        }

    def rates(self, timings: Mapping[str, Timing]) -> Rates:
        """What the calls' best times come to: what disturbs them does not lift the floor."""
        flops_s = [2 * ROWS * SIDE * SIDE / timings[GEMM].best_s]
        for name, bf16 in self._kinds.items():
            times = INT8_OF_FP32 if name == FP32_REGISTERS else 1
            flops_s.append(times * _multiply(bf16, self._steps[name]) / timings[name].best_s)
        return Rates(self._data.nbytes / timings[READ].best_s, max(flops_s))


def _multiply(bf16: bool, steps: int) -> int:
    """Multiplies in registers; how many operations that were."""
    done: int = torch.ops.splitpoint.multiply_registers(bf16, steps)
    return done
