"""`splitpoint bench linear`: one linear layer, size by size, variant by variant."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..config import Weights
from ..errors import OutputMismatch
from ..kernels.layout import packed_shape
from ..kernels.memory import Streamed
from ..kernels.reference import linear, quantised_rows
from ..passes.linear import LAYOUTS, Layers, layouts_of, nbytes, rounded
from ..passes.linear import VARIANTS as KERNELS
from ..passes.linear import Variant as Kernel
from ..passes.linear_sites import LinearShape
from ..torch_internals.onednn import prepacked_linear
from ..tuning.measure import Timing, clock_for, interleave

COLD_BYTES = 256 << 20
"""Weights of a variant that calls cycle through, so that each call finds its weight in memory,
not in a cache: in a model, the other layers' weights have passed through since. Larger than
the last-level cache of most machines; one was seen to keep 96 MiB of 128."""

MOST_ROWS_OF_GEMV = 16
"""Sizes above this are not timed for the row-dot kernel: it is out of its depth there."""

READ = "read "
"""Before the name of a variant: what reads its copies of the weight in the same order, which is
timed beside it for the floor."""


@dataclass(frozen=True)
class Layer:
    """A way to run a layer, with a copy of the weight of its own."""

    run: Callable[[Tensor], Tensor]
    """x [tokens, k] -> y [tokens, n]."""
    held: tuple[Tensor, ...] = ()
    """What of the weight it reads; none where nothing else can read it."""


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
) -> list[LayerRow]:
    """Time a [n, k] layer without bias at each size by each variant, taking turns.

    Variants: "linear" (`F.linear`), "onednn" (oneDNN over its own layout), "gemv" and "packed"
    (this package's kernels), and with `weights` the kernels over a weight rounded to that. Each is
    compared with float64 before it is timed. `cold` has calls cycle through copies of the weight,
    as they do in a model; otherwise one copy is called again and again. `budget_s` is for each
    variant at each size. Reading the same copies, on the same pages and in the same order, takes
    turns with the variants. A floor is by the best rate that was seen in all that, by readers and
    by variants themselves: of all where weights are cold, and so in memory; else of the variant
    alone, whose weight may lie in another cache than others do.

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
    found: dict[int, dict[str, Timing]] = {}
    with _threads(threads), torch.inference_mode():
        layers = {name: _made(each, cold) for name, each in variants.items()}
        for size in sizes:
            x = torch.randn(size, k, generator=rng).to(dtype)
            timed: dict[str, Callable[[], object]] = {}
            for name, each in variants.items():
                if each.largest_size is None or size <= each.largest_size:
                    _verify(name, layers[name][0].run(x), x, weight)
                    timed[name] = _cycling([layer.run for layer in layers[name]], x)
                    if all(layer.held for layer in layers[name]):
                        timed[READ + name] = _reading(layers[name])
            found[size] = interleave(
                timed, clock=clock_for(threads), budget_s=budget_s, warm_up=1, repeats=9
            )
    rates = _rates(found, variants, cold)
    return [
        LayerRow(
            n=n,
            k=k,
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            size=size,
            variant=name,
            timing=timing,
            weight_bytes=variants[name].weight_bytes,
            floor_s=variants[name].weight_bytes / rates[name],
            over_linear=timings["linear"].median_s / timing.median_s,
            over_onednn=timings["onednn"].median_s / timing.median_s
            if "onednn" in timings
            else None,
        )
        for size, timings in found.items()
        for name, timing in timings.items()
        if name in variants
    ]


def _rates(
    found: Mapping[int, Mapping[str, Timing]], variants: Mapping[str, Variant], cold: bool
) -> dict[str, float]:
    """Bytes a second at the best at which the weight of each variant was read at any size."""
    rates = {
        name: max(
            each.weight_bytes / timings[way].best_s
            for timings in found.values()
            for way in (name, READ + name)
            if way in timings
        )
        for name, each in variants.items()
        if any(name in timings for timings in found.values())
    }
    return dict.fromkeys(rates, max(rates.values())) if cold else rates


def _variants(weight: Tensor, weights: Weights | None) -> dict[str, Variant]:
    """The ways to run a layer; what they read lies as packed weights of a model do."""
    ops = torch.ops.splitpoint
    n, k = weight.shape
    placed = Streamed().placed

    def plain() -> Layer:
        copy = placed(weight)
        return Layer(lambda x: F.linear(x, copy), (copy,))

    def gemv() -> Layer:
        copy = placed(weight)
        return Layer(lambda x: ops.linear_gemv(x, [copy], [], [])[0], (copy,))

    def packed() -> Layer:
        copy = placed(ops.pack_weight(weight))
        return Layer(lambda x: ops.linear_packed(x, [copy], [n], [], [])[0], (copy,))

    def onednn() -> Layer:
        layer = prepacked_linear(weight)
        assert layer is not None
        return Layer(layer)

    found = {"linear": Variant(weight.nbytes, plain)}
    if prepacked_linear(weight) is not None:
        found["onednn"] = Variant(weight.nbytes, onednn)
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
                found[name] = Variant(
                    size, functools.partial(_rounded, each, shape, weight, placed)
                )
    return found


def _rounded(
    kernel: Kernel, shape: LinearShape, weight: Tensor, placed: Callable[[Tensor], Tensor]
) -> Layer:
    """A layer by a kernel that makes something else of a weight."""
    packed = [placed(LAYOUTS[layout].pack(weight)) for layout in layouts_of(kernel, shape)]
    given = Layers(shape, packed[:1], packed[1:])
    return Layer(lambda x: kernel.run(x, given)[0], tuple(packed))


def _bytes(shape: Sequence[int], itemsize: int) -> int:
    return torch.Size(shape).numel() * itemsize


def _made(variant: Variant, cold: bool) -> list[Layer]:
    count = max(2, -(-COLD_BYTES // variant.weight_bytes)) if cold else 1
    return [variant.make() for _ in range(count)]


def _cycling(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], object]:
    following = itertools.cycle(layers)
    return lambda: next(following)(x)


def _reading(layers: Sequence[Layer]) -> Callable[[], object]:
    """Reads what each layer in turn holds."""
    read = torch.ops.splitpoint.read_memory
    following = itertools.cycle(layers)

    def one() -> None:
        for tensor in next(following).held:
            read(tensor)

    return one


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
