"""`splitpoint bench linear`: one linear layer, size by size, variant by variant."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..config import Weights
from ..errors import OutputMismatch
from ..kernels.layout import packed_shape
from ..kernels.reference import linear, quantised_rows
from ..passes.linear import LAYOUTS, Layers, layouts_of, nbytes, rounded
from ..passes.linear import VARIANTS as KERNELS
from ..passes.linear import Variant as Kernel
from ..passes.linear_sites import LinearShape
from ..torch_internals.onednn import prepacked_linear
from ..tuning.measure import Timing, clock_for, interleave

COLD_BYTES = 128 << 20
"""Weights of a variant that calls cycle through, so that each call finds its weight in memory,
not in a cache: in a model, the other layers' weights have passed through since. Larger than
the last-level cache of most machines."""

MOST_ROWS_OF_GEMV = 16
"""Sizes above this are not timed for the row-dot kernel: it is out of its depth there."""

READ = "read memory"
"""What is timed beside the variants for the floor."""

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerRow:
    """What one variant took at one size."""

    n: int
    k: int
    dtype: str
    threads: int
    size: int
    variant: str
    timing: Timing
    """Seconds a call: thread CPU time with one thread, else wall time."""
    weight_bytes: int
    floor_s: float
    """The time that reading the variant's weight once takes at the measured bandwidth."""
    over_linear: float
    """How many times as fast as `F.linear`."""
    over_onednn: float | None
    """How many times as fast as oneDNN over its own layout; None where that does not exist."""

    @property
    def floor_share(self) -> float:
        """The share of the memory bandwidth that was reached: 1.0 is the floor itself."""
        return self.floor_s / self.timing.median_s


@dataclass(frozen=True)
class Variant:
    """One way to run a layer."""

    weight_bytes: int
    make: Callable[[], Layer]
    """Lays a new copy of the weight out."""
    largest_size: int | None = None


def memory_bandwidth(threads: int, repeats: int = 41) -> float:
    """Bytes a second that `threads` threads read from memory, beyond the caches: the best of
    many short repeats, as it is to be a floor.

    Raises:
        KernelBuildError: when the kernels cannot be built.
    """
    kernels.load()
    data = torch.ones(COLD_BYTES, dtype=torch.uint8)
    clock = clock_for(threads)
    with _threads(threads):
        read = {"read": lambda: torch.ops.splitpoint.read_memory(data)}
        timing = interleave(read, clock=clock, budget_s=0.3, repeats=repeats)["read"]
    return data.nbytes / timing.best_s


def measure_layer(
    n: int,
    k: int,
    dtype: torch.dtype,
    sizes: Sequence[int],
    threads: int = 1,
    *,
    cold: bool = True,
    weights: Weights | None = None,
    budget_s: float = 0.3,
    bandwidth: float | None = None,
) -> list[LayerRow]:
    """Time a [n, k] layer without bias at each size by each variant, taking turns.

    Variants: "linear" (`F.linear`), "onednn" (oneDNN over its own layout), "gemv" and "packed"
    (this package's kernels), and with `weights` the kernels over a weight rounded to that. Each is
    compared with float64 before it is timed. `cold` has calls cycle through copies of the weight,
    as they do in a model; otherwise one copy is called again and again. `budget_s` is for each
    variant at each size. Without `bandwidth` (bytes a second) reading memory takes turns with the
    variants too, so that floors are of the moment: other processes share the memory's bandwidth.

    Raises:
        OutputMismatch: when a variant is further from float64 than rounding explains.
        KernelBuildError: when the kernels cannot be built.
        ValueError: for a dtype other than float32 and bfloat16, and for a k that 4 bits do not
            divide into groups.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    kernels.load()
    rng = torch.Generator().manual_seed(n * k)
    weight = (torch.randn(n, k, generator=rng) / k**0.5).to(dtype)
    variants = _variants(weight, weights)
    data = torch.ones(COLD_BYTES if bandwidth is None else 0, dtype=torch.uint8)
    rows: list[LayerRow] = []
    with _threads(threads), torch.inference_mode():
        layers = {
            name: [each.make() for _ in range(_copies(each.weight_bytes, cold))]
            for name, each in variants.items()
        }
        for size in sizes:
            x = torch.randn(size, k, generator=rng).to(dtype)
            timed = {
                name: _cycling(layers[name], x)
                for name, each in variants.items()
                if each.largest_size is None or size <= each.largest_size
            }
            for name in timed:
                _verify(name, layers[name][0](x), x, weight)
            if bandwidth is None:
                timed[READ] = lambda: torch.ops.splitpoint.read_memory(data)
            timings = interleave(
                timed, clock=clock_for(threads), budget_s=budget_s, warm_up=1, repeats=9
            )
            read = timings.pop(READ, None)
            rate = bandwidth or (data.nbytes / read.median_s if read else math.inf)
            for name, timing in timings.items():
                onednn = timings.get("onednn")
                rows.append(
                    LayerRow(
                        n=n,
                        k=k,
                        dtype=str(dtype).removeprefix("torch."),
                        threads=threads,
                        size=size,
                        variant=name,
                        timing=timing,
                        weight_bytes=variants[name].weight_bytes,
                        floor_s=variants[name].weight_bytes / rate,
                        over_linear=timings["linear"].median_s / timing.median_s,
                        over_onednn=onednn.median_s / timing.median_s if onednn else None,
                    )
                )
    return rows


def _variants(weight: Tensor, weights: Weights | None) -> dict[str, Variant]:
    ops = torch.ops.splitpoint
    n, k = weight.shape

    def plain() -> Layer:
        copy = weight.clone()
        return lambda x: F.linear(x, copy)

    def gemv() -> Layer:
        copy = weight.clone()
        return lambda x: ops.linear_gemv(x, [copy], [], [])[0]

    def packed() -> Layer:
        copy = ops.pack_weight(weight)
        return lambda x: ops.linear_packed(x, [copy], [n], [], [])[0]

    found = {"linear": Variant(weight.nbytes, plain)}
    if prepacked_linear(weight) is not None:
        found["onednn"] = Variant(weight.nbytes, lambda: _existing(prepacked_linear(weight)))
    found["gemv"] = Variant(weight.nbytes, gemv, MOST_ROWS_OF_GEMV)
    found["packed"] = Variant(_bytes(packed_shape(n, k, weight.dtype), weight.itemsize), packed)
    if weights is not None:
        shape = LinearShape((n,), k, weight.dtype)
        for name, each in KERNELS.items():
            if each.weights == weights:
                if each.activations and not each.fits(shape):
                    continue  # deeper than int32 sums hold
                if not each.fits(shape):
                    raise ValueError(f"no group of 4-bit values divides k = {k}")
                layouts = layouts_of(each, shape)
                size = sum(nbytes(shape, layout)[0] for layout in layouts)
                found[name] = Variant(size, functools.partial(_rounded, each, shape, weight))
    return found


def _rounded(kernel: Kernel, shape: LinearShape, weight: Tensor) -> Layer:
    """A layer by a kernel that makes something else of a weight."""
    packed = [LAYOUTS[layout].pack(weight) for layout in layouts_of(kernel, shape)]
    given = Layers(shape, packed[:1], packed[1:])
    return lambda x: kernel.run(x, given)[0]


def _existing(layer: Layer | None) -> Layer:
    assert layer is not None
    return layer


def _bytes(shape: Sequence[int], itemsize: int) -> int:
    return torch.Size(shape).numel() * itemsize


def _copies(weight_bytes: int, cold: bool) -> int:
    return max(2, -(-COLD_BYTES // weight_bytes)) if cold else 1


def _cycling(layers: Sequence[Layer], x: Tensor) -> Callable[[], object]:
    following = itertools.cycle(layers)
    return lambda: next(following)(x)


def _verify(name: str, y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Refuse an output that is not explained by rounding: sums in float32 in any order, to
    first order k 2^-24 sum|x w|, then the output dtype's own. Kernels that round weights are
    compared with what these are then."""
    kernel = KERNELS.get(name)
    if kernel is not None and kernel.weights:
        weight = rounded(weight, kernel.weights)
    if kernel is not None and kernel.activations:
        values, scale = quantised_rows(x)
        x = values.double() * scale.double()[:, None]
    (exact,) = linear(x, [weight])
    magnitude = x.double().abs() @ weight.double().abs().t()
    roundoff = torch.finfo(y.dtype).eps / 2
    allowed = (x.shape[1] + 4) * 2.0**-24 * magnitude + 1.01 * roundoff * exact.abs() + 1e-30
    if kernel is not None and kernel.rounds:
        allowed += roundoff * magnitude
    worst = float(((y.double() - exact).abs() / allowed).nan_to_num(nan=torch.inf).max())
    if worst > 1:
        raise OutputMismatch(
            f"variant {name!r} at size {x.shape[0]} of a {tuple(weight.shape)} layer is off by "
            f"{worst:.3g} times what rounding explains: it was not timed"
        )


class _threads:
    """Sets torch's intra-op threads inside a context."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
