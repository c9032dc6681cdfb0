"""RMS norms by the C++ kernels in vLLM's own library, where its models run eagerly.

On CPU vLLM writes a norm as a dozen of torch's operators, for a compiler to make one of. Where
there is none they take a tenth of a step. Its library has a kernel for each kind of norm, and
its table of implementations takes them by a name.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ...kernels.bounds import ROUNDOFF, TINY, U32
from ...tuning.measure import clock_for, interleave
from . import names
from .choice import OURS, Measured, choose
from .shapes import TYPES

PROVIDER = "splitpoint"
"""What vLLM's table calls these implementations."""

ROWS = (1, 8, 64)
PROBE_S = 0.002
EPS = 1e-5

MULTIPLE = 16
"""Of values in a row, which the kernels read a register at a time."""

Size = tuple[int, torch.dtype]
"""Of what is normalised: its last dimension and dtype."""


class Norms:
    """The kernels, which vLLM calls for the sizes where they are right and faster.

    vLLM warns of those that are made once it knows which ones it prefers, as its workers do when
    they start.

    Raises:
        UnsupportedVllm: when vLLM's table is not what it is taken to be.
    """

    def __init__(self) -> None:
        names.check(names.NORMS)
        self._plain, self._added = names.RMS_NORM.value, names.ADD_RMS_NORM.value
        self.sizes: set[Size] = set()
        self._register()

    def take_over(self, model: Any) -> str:
        """Have vLLM call the kernels, and say for which norms of a model."""
        found: Counter[Size] = Counter()
        norm_type = names.NORM_LAYER.value
        for module in model.modules():
            if isinstance(module, norm_type) and module.weight.dtype in TYPES:
                found[module.weight.shape[-1], module.weight.dtype] += 1
        self.sizes |= {size for size in found if size not in self.sizes and self._is_better(*size)}
        for op in (self._plain, self._added):
            op.set_default([PROVIDER, *(each for each in op.get_priority() if each != PROVIDER)])
        taken = [
            f"{count} of {size} {TYPES[dtype]}"
            for (size, dtype), count in found.items()
            if (size, dtype) in self.sizes
        ]
        return f"norms by vLLM's kernels in C++: {', '.join(taken) or 'none'}"

    def _register(self) -> None:
        def takes(x: Tensor, weight: Tensor | None) -> bool:
            return (
                weight is not None
                and weight.dtype == x.dtype
                and x.is_contiguous()
                and (x.shape[-1], x.dtype) in self.sizes
            )

        # vLLM compares the names, types and defaults of arguments with its own.
        def takes_plain(
            x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
        ) -> bool:
            return variance_size is None and takes(x, weight)

        def takes_added(
            x: Tensor,
            x_residual: Tensor,
            weight: Tensor | None,
            epsilon: float,
            variance_size: int | None = None,
        ) -> bool:
            return (
                variance_size is None
                and takes(x, weight)
                and x_residual.dtype == x.dtype
                and x_residual.shape == x.shape
                and x_residual.is_contiguous()
            )

        self._plain.register_impl(PROVIDER, supports_args=takes_plain)(rms_norm)
        self._added.register_impl(PROVIDER, supports_args=takes_added, inplace=True)(
            fused_add_rms_norm
        )

    def _is_better(self, size: int, dtype: torch.dtype) -> bool:
        """Whether the kernels are right, and faster over the measured rows."""
        return is_right(size, dtype) and choose(self._times(size, dtype), False) == OURS

    def _times(self, size: int, dtype: torch.dtype) -> Measured:
        """Seconds of a norm with a residual, which is what most norms of a model are."""
        native = self._added.impls["native"].impl_fn
        found = {}
        for rows in ROWS:
            x, residual, weight = _random(rows, size, dtype)
            made = interleave(
                {
                    "ours": functools.partial(fused_add_rms_norm, x, residual, weight, EPS),
                    "theirs": functools.partial(native, x, residual, weight, EPS),
                },
                clock=clock_for(torch.get_num_threads()),
                budget_s=PROBE_S,
                repeats=5,
            )
            found[rows] = (made["ours"].median_s, made["theirs"].median_s)
        return found


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """The norm of x [..., size], as vLLM's operator of this name; `variance_size` is None."""
    norm = torch.empty_like(x)
    torch.ops._C.rms_norm(norm, x, weight, epsilon)
    return norm


def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of a sum, written over x, and the sum, written over the residual; else as
    `rms_norm`."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def is_right(size: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take rows of this size, and give what float64 gives but for rounding."""
    if size % MULTIPLE:
        return False
    x, residual, weight = _random(ROWS[-1] + 1, size, dtype)
    summed = x.double() + residual.double()
    norm, made = fused_add_rms_norm(x.clone(), residual.clone(), weight, EPS)
    return (
        _is_near(rms_norm(x, weight, EPS), _reference(x.double(), weight), size)
        and _is_near(made, summed, size)
        and _is_near(norm, _reference(summed, weight), size)
    )


def _random(rows: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """x and a residual of so many rows, and a weight."""
    generator = torch.Generator().manual_seed(0)  # vLLM's own stays as it was
    shapes = [(rows, size), (rows, size), (size,)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    """The norm in float64."""
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def _is_near(made: Tensor, exact: Tensor, size: int) -> bool:
    """Whether a norm or a sum is what it should be, for sums of squares in float32 in any order: a
    sum, its mean square, what it is divided by and the result may each be rounded to its dtype."""
    relative = 4 * ROUNDOFF[made.dtype] + (size + 8) * U32
    return bool(((made.double() - exact).abs() <= relative * exact.abs() + TINY).all())
