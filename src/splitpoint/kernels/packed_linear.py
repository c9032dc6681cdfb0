"""A linear layer that holds its weight as the kernels read it, in 4 or 8 bits, and no other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import load


class PackedLinear(nn.Module):
    """y = x @ weight^T + bias over a packed weight, summed in float32.

    x may have any dtype that the kernels take. Compiling gives the layer the kernel of each range
    and joins it with its neighbours, as it does with `nn.Linear`.

    Args:
        packed: as `int4` or `layout` describe it.
        n, k: the weight stands for [n, k].
        scale: [n] float32 of an int8 weight; None of 4 bits.
        bias: [n], of the dtype that the layer computes in, or None.
        order: [k] int64, the column of x that each k of the weight multiplies; None for its own.

    Raises:
        KernelBuildError: when there are no kernels: nothing else reads these weights.
    """

    def __init__(
        self,
        packed: Tensor,
        n: int,
        k: int,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        load()
        self.out_features, self.in_features = n, k
        self.packed: Tensor
        self.scale: Tensor | None
        self.order: Tensor | None
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("order", order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] to [..., n]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        scales = [] if self.scale is None else [self.scale]
        biases = [] if self.bias is None else [self.bias]
        made: list[Tensor] = torch.ops.splitpoint.linear_packed(
            x, [self.packed], [self.out_features], scales, biases
        )
        return made[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale  # part of the weight, which a dtype for computing does not change
        return self

    def weight(self, dtype: torch.dtype) -> Tensor:
        """What the packed weight stands for, [n, k], rounded to a dtype."""
        n, k = self.out_features, self.in_features
        turned = torch.ops.splitpoint.unpack_weight(self.packed, self.scale, n, k, dtype)
        whole: Tensor = turned.t() if self.order is None else turned[self.order.argsort()].t()
        return whole

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        bits = 4 if self.scale is None else 8
        return f"{self.in_features}, {self.out_features}, {bits} bits, bias={self.bias is not None}"


def scales_as_exact(scales: Tensor) -> Tensor:
    """Scales as bfloat16 if all of them are numbers of it, else as float32."""
    narrow = scales.to(torch.bfloat16)
    return narrow if torch.equal(narrow.float(), scales.float()) else scales.float()
