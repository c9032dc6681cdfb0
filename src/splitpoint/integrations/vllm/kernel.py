"""A linear layer on this package's kernel, called as vLLM calls its own.

Import it when the kernels are loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.memory import Streamed
from .choice import THEIRS, Choice
from .measuring import CpuLinear
from .rounded import by_rows
from .shapes import Shape

_linear_packed = torch.ops.splitpoint.linear_packed


class Packed:
    """A weight in this package's layout, and its product."""

    def __init__(self, weight: Tensor, memory: Streamed) -> None:
        with torch.inference_mode(False), torch.no_grad():
            packed = torch.ops.splitpoint.pack_weight(weight.detach().contiguous())
            self.weights = [memory.placed(packed)]
        self.columns = [weight.shape[0]]
        self.k = weight.shape[1]

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x [..., k] times the packed weight; the one that is given may have been freed."""
        biases = [] if bias is None else [bias.to(x.dtype)]
        made: Tensor = _linear_packed(x, self.weights, self.columns, [], biases)[0]
        return made


class Late:
    """As `Packed`, of a weight that stays as it is; packed when first called, as the weight of an
    embedding may never be.

    Args:
        pack: makes what is called.
    """

    def __init__(self, pack: Callable[[], CpuLinear]) -> None:
        self._pack = pack
        self._packed: CpuLinear | None = None

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As `Packed`."""
        if self._packed is None:
            self._packed = self._pack()
        return self._packed(x, weight, bias)


class Setter:
    """Sets what vLLM calls for the layers of one model.

    Args:
        theirs: vLLM's function that sets its own.
        memory: where packed weights go.
    """

    def __init__(self, theirs: Callable[[Any, bool], None], memory: Streamed) -> None:
        self._theirs = theirs
        self._memory = memory
        self._late: dict[int, Late] = {}

    def set(self, module: Any, may_free: bool, choice: Choice, shape: Shape) -> None:
        """Set a layer's `cpu_linear`, and free its weight if that may be."""
        rounds = shape.weights is not None
        if not rounds and choice == THEIRS:
            self._theirs(module, may_free)
        elif not may_free:
            # Layers may share it, as an LM head and an embedding do.
            key = module.weight.data_ptr()
            if key not in self._late:
                weight = module.weight.data
                self._late[key] = Late(lambda: self._packed(weight, choice, shape))
            module.cpu_linear = self._late[key]
        elif not rounds and choice.most is not None:
            ours = Packed(module.weight.data, self._memory)
            self._theirs(module, True)
            module.cpu_linear = either(ours, module.cpu_linear, choice.most)
        else:
            module.cpu_linear = self._packed(module.weight.data, choice, shape)
            empty = torch.empty(0, dtype=module.weight.dtype)
            module.weight = nn.Parameter(empty, requires_grad=False)

    def _packed(self, weight: Tensor, choice: Choice, shape: Shape) -> CpuLinear:
        """What needs the weight in no other form."""
        if shape.weights is None:
            return Packed(weight, self._memory)
        return by_rows(weight, shape, choice, self._memory)


def either(ours: Packed, theirs: CpuLinear, most: int) -> CpuLinear:
    """`ours` for x of up to `most` rows, `theirs` for more."""
    k = ours.k
    index = next(_indices)
    _theirs[index] = theirs
    handle = torch.tensor(index)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            # Rows are not known while a graph is traced, and must not become a constant in it.
            made: Tensor = torch.ops.splitpoint_vllm.linear(
                x, ours.weights[0], ours.columns[0], bias, handle, most
            )
            return made
        if x.numel() <= most * k:
            return ours(x, weight, bias)
        return theirs(x, weight, bias)

    return run


# --- `either` as one operator ----------------------------------------------------------

_indices = itertools.count()
_theirs: dict[int, CpuLinear] = {}

_library = torch.library.Library("splitpoint_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
# `handle` holds an index of `_theirs`: in a tensor, since a number would be written into a
# compiled graph, which another process may load.
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor packed, int columns, Tensor? bias, Tensor handle, int most) -> Tensor"
)


def _linear(
    x: Tensor, packed: Tensor, columns: int, bias: Tensor | None, handle: Tensor, most: int
) -> Tensor:
    if x.numel() <= most * x.shape[-1]:
        biases = [] if bias is None else [bias.to(x.dtype)]
        made: Tensor = _linear_packed(x, [packed], [columns], [], biases)[0]
        return made
    return _theirs[int(handle)](x, None, bias)


def _linear_without_data(
    x: Tensor, packed: Tensor, columns: int, bias: Tensor | None, handle: Tensor, most: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("splitpoint_vllm::linear", _linear_without_data, lib=_library)
