"""Give the linear layers of a piece the kernel and the weight layout that fit a range.

Unlike a `Pass`, which rewrites what Inductor already sees, this rewrites the captured piece
before it is compiled: a packed weight is another input, made once outside the graph, so that
pieces hold no weights and equal layers still share one graph.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import kernels
from ..graph.pieces import Piece
from ..kernels.int4 import (
    INT4_FORMATS,
    Int4Format,
    dequantize_int4,
    int4_group,
    pack_int4,
    quantize_int4,
)
from ..kernels.layout import (
    MOST_INT8_DEPTH,
    packed_shape,
    quads,
    quads_of_packed,
    quads_shape,
    quantize,
)
from ..ranges import Range
from ..torch_internals.onednn import onednn_linear_available, onednn_linear_op, onednn_pack
from .linear_sites import LinearShape, Site, find


@dataclass(frozen=True)
class Layout:
    """How a weight lies in memory for a kernel."""

    shape: Callable[[int, int, torch.dtype], tuple[int, ...]]
    """Of a weight of n columns over k, of a dtype."""
    pack: Callable[[Tensor], Tensor]
    """From the weight as the module holds it."""
    dtype: torch.dtype | None = None
    """Of what lies there, where it is not the weight's own."""


@dataclass(frozen=True)
class Variant:
    """One way to run linear layers. Adding one is adding an entry to `VARIANTS`."""

    name: str
    layout: str
    """Key of `LAYOUTS`, but for transposed weights "..._t"; "plain" takes the module's own, as do
    all but `dynamic` where it holds packed ones. For weights of 4 bits, what comes before "_64"
    and the like, which is their group."""
    fits: Callable[[LinearShape], bool]
    """Whether it can run a layer at all."""
    promises: Callable[[Range], bool]
    """Whether it is worth measuring in a range."""
    fuses: bool
    """Whether what belongs to a layer runs in the kernel; otherwise Inductor does that."""
    run: Callable[[Tensor, Layers], list[Tensor]]
    """From x [..., k] to y [..., n] for each output. Made of operators that a graph can hold, as
    it is traced into one."""
    weights: str = ""
    """What it makes of the module's weights: "int8" or "int4", or "" where it takes their values
    as they are. Chosen only where `Config.weights` asks for it."""
    rounds: bool = False
    """Whether it rounds weights that it unpacks to x's dtype, whatever they are; `rounds` says
    whether it does those of a layer."""
    batch_invariant: bool = False
    """Whether a row's result has the same bits however many rows there are. Chosen where
    `Config.batch_invariant` asks for it, and only there."""
    activations: str = ""
    """What it rounds x to, a scale a row: "int8" (`kernels.reference.quantised_rows`), or "" where
    it takes x as it is. Chosen only where `Config.activations` asks for it. Sums are exact then, or
    added in the order of k, so that it is batch-invariant as well."""
    exact_sums: bool = False
    """Whether products are summed in integers to the end, and so without any rounding."""


@dataclass(frozen=True)
class Layers:
    """What a variant runs: `shape` says what is there."""

    shape: LinearShape
    weights: Sequence[Tensor]
    """In the variant's layout."""
    scales: Sequence[Tensor] = ()
    """Of int8 weights, float32."""
    biases: Sequence[Tensor] = ()
    residual: Tensor | None = None
    """[..., n]."""
    batch_invariant: bool = False


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def finish(products: Sequence[Tensor], layers: Layers) -> list[Tensor]:
    """What belongs to layers and follows their products, in plain torch."""
    activate = ACTIVATIONS[layers.shape.activation]
    if layers.shape.gated:
        results = [activate(products[0]) * products[1]]
    else:
        results = [activate(product) for product in products]
    return results if layers.residual is None else [y + layers.residual for y in results]


def _gemv(x: Tensor, given: Layers) -> list[Tensor]:
    made: list[Tensor] = torch.ops.splitpoint.linear_gemv.default(
        x,
        [*given.weights],
        [*given.scales],
        [*given.biases],
        given.residual,
        given.shape.activation,
        given.shape.gated,
    )
    return [made[index] for index in range(len(given.shape.outputs))]


def _packed(x: Tensor, given: Layers, round_x: bool = False) -> list[Tensor]:
    made: list[Tensor] = torch.ops.splitpoint.linear_packed.default(
        x,
        [*given.weights],
        [*given.shape.columns],
        [*given.scales],
        [*given.biases],
        given.residual,
        given.shape.activation,
        given.shape.gated,
        given.batch_invariant,
        round_x,
    )
    return [made[index] for index in range(len(given.shape.outputs))]


def _rounding(x: Tensor, given: Layers) -> list[Tensor]:
    return _packed(x, given, round_x=True)


def _onednn(x: Tensor, given: Layers) -> list[Tensor]:
    linear = onednn_linear_op()
    biases: Sequence[Tensor | None] = given.biases or [None] * len(given.weights)
    pairs = zip(given.weights, biases, strict=True)
    return finish([linear(x, weight, bias) for weight, bias in pairs], given)


def _unpacked(x: Tensor, given: Layers) -> list[Tensor]:
    shape, products = given.shape, []
    for index, (weight, n) in enumerate(zip(given.weights, shape.columns, strict=True)):
        scale = given.scales[index] if given.scales else None
        whole = torch.ops.splitpoint.unpack_weight.default(weight, scale, n, shape.k, shape.dtype)
        bias = given.biases[index] if given.biases else None
        products.append(F.linear(x, whole.t(), bias))
    return finish(products, given)


def _int4(made: Int4Format) -> Layout:
    def pack(weight: Tensor) -> Tensor:
        values, scales, zeros = quantize_int4(weight, made.group, made.zero_points)
        return pack_int4(values, scales.float() if made.wide_scales else scales, zeros)

    return Layout(lambda n, k, dtype: made.shape(n, k), pack, torch.uint8)


def _of_transposed(layout: Layout) -> Layout:
    return replace(layout, pack=lambda w: layout.pack(w.t()))


_QUANTISED = {
    "int8": Layout(
        lambda n, k, dtype: packed_shape(n, k, torch.int8),
        lambda w: torch.ops.splitpoint.pack_weight(quantize(w)[0]),
        torch.int8,
    ),
    "int8_quads": Layout(
        lambda n, k, dtype: quads_shape(n, k), lambda w: quads(quantize(w)[0]), torch.int8
    ),
    "quads": Layout(lambda n, k, dtype: quads_shape(n, k), quads, torch.int8),
    "int8_scales": Layout(lambda n, k, dtype: (n,), lambda w: quantize(w)[1], torch.float32),
    **{str(made): _int4(made) for made in INT4_FORMATS},
}

LAYOUTS: dict[str, Layout] = {
    "plain": Layout(lambda n, k, dtype: (n, k), lambda w: w),
    "packed": Layout(packed_shape, lambda w: torch.ops.splitpoint.pack_weight(w)),
    "packed_t": Layout(packed_shape, lambda w: torch.ops.splitpoint.pack_weight(w.t())),
    # Opaque: oneDNN blocks it as it likes, so nothing may look at its strides.
    "onednn": Layout(lambda n, k, dtype: (n, k), onednn_pack),
    "onednn_t": Layout(lambda n, k, dtype: (n, k), lambda w: onednn_pack(w.t().contiguous())),
    # Not of a weight but of the factors of an int8 one, [n].
    "float32": Layout(lambda n, k, dtype: (n,), lambda scale: scale.float(), torch.float32),
    **_QUANTISED,
    "quads_of_packed": Layout(lambda n, k, dtype: quads_shape(n, k), quads_of_packed, torch.int8),
    **{f"{name}_t": _of_transposed(layout) for name, layout in _QUANTISED.items()},
}


def _can_round(shape: LinearShape) -> bool:
    return not shape.is_quantised


def _takes_int4(shape: LinearShape) -> bool:
    return _can_round(shape) and int4_group(shape.k) is not None


def _holds_int4(shape: LinearShape) -> bool:
    return bool(shape.packed) and not shape.int8


def _any_rows(rows: Range) -> bool:
    return True


def _many_rows(rows: Range) -> bool:
    return rows.end >= 32


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "gemv",
            "plain",
            lambda s: not s.transposed and not s.packed,
            lambda r: r.end <= 16,
            True,
            _gemv,
        ),
        Variant("packed", "packed", lambda s: True, _any_rows, True, _packed),
        Variant("unpacked", "packed", lambda s: bool(s.packed), _many_rows, False, _unpacked),
        Variant(
            "onednn",
            "onednn",
            lambda s: not s.is_quantised and onednn_linear_available(s.dtype),
            lambda r: r.end >= 16,
            False,
            _onednn,
        ),
        Variant(
            "invariant",
            "packed",
            lambda s: not s.packed or s.int8,
            lambda r: False,
            True,
            _packed,
            batch_invariant=True,
        ),
        Variant("int8", "int8", _can_round, _any_rows, True, _packed, "int8"),
        Variant(
            "int8_unpacked", "int8", _can_round, _many_rows, False, _unpacked, "int8", rounds=True
        ),
        Variant(
            "int8_invariant",
            "int8",
            _can_round,
            lambda r: False,
            True,
            _packed,
            "int8",
            batch_invariant=True,
        ),
        Variant(
            "int8_dynamic",
            "int8_quads",
            lambda s: _can_round(s) and s.k <= MOST_INT8_DEPTH,
            _any_rows,
            True,
            _packed,
            "int8",
            activations="int8",
            exact_sums=True,
        ),
        Variant(
            "dynamic",
            "quads",
            lambda s: s.int8 and s.k <= MOST_INT8_DEPTH,
            _any_rows,
            True,
            _packed,
            activations="int8",
            exact_sums=True,
        ),
        Variant(
            "dynamic_int4", "plain", _holds_int4, _any_rows, True, _rounding, activations="int8"
        ),
        Variant("int4", "int4", _takes_int4, _any_rows, True, _packed, "int4", rounds=True),
        Variant(
            "int4_unpacked", "int4", _takes_int4, _many_rows, False, _unpacked, "int4", rounds=True
        ),
        Variant(
            "int4_dynamic",
            "int4",
            _takes_int4,
            _any_rows,
            True,
            _rounding,
            "int4",
            activations="int8",
        ),
    )
}
"""Kernels of this package, by name. "inductor", which is not in it, leaves a layer as it is."""


def rounded(weight: Tensor, weights: str) -> Tensor:
    """The values, float32, that variants of `weights` ("int8", "int4") make of a [n, k] weight; its
    own where they cannot."""
    if weights == "int8":
        values, scale = quantize(weight)
        return values * scale[:, None]
    group = int4_group(weight.shape[1])
    return weight.float() if group is None else dequantize_int4(*quantize_int4(weight, group))


def layout_of(variant: Variant, shape: LinearShape) -> str:
    """The key of `LAYOUTS` of a layer's weights for a variant."""
    if shape.packed:  # the module holds no other
        return f"{variant.layout}_of_packed" if variant.layout == "quads" else "plain"
    name = variant.layout
    if variant.weights == "int4":
        name = f"{name}_{int4_group(shape.k)}"
    return f"{name}_t" if shape.transposed else name


def admitted(
    shape: LinearShape, weights: str, activations: str, batch_invariant: bool = False
) -> list[Variant]:
    """The variants that can run a layer, and make of its weights and of x what is asked for:
    `weights` in any case, `activations` where they gain by it. With `batch_invariant` those alone
    whose rows do not depend on each other."""
    return [
        v
        for v in VARIANTS.values()
        if v.weights == weights
        and v.activations in ("", activations)
        and v.fits(shape)
        and (not batch_invariant or v.batch_invariant or v.activations)
    ]


def scales_layout_of(variant: Variant, shape: LinearShape) -> str | None:
    """The key of `LAYOUTS` of the scales that a variant makes of a layer's weights, if they do not
    lie in the weights' own."""
    if variant.weights != "int8":
        return None
    return "int8_scales_t" if shape.transposed else "int8_scales"


def rounds(variant: Variant, shape: LinearShape) -> bool:
    """Whether a variant rounds weights of a layer that it unpacks to x's dtype."""
    if variant.rounds or not shape.packed or variant.activations:
        return variant.rounds
    return variant.name == "unpacked" or not shape.int8


def layouts_of(variant: Variant, shape: LinearShape) -> list[str]:
    """The keys of `LAYOUTS` of all that a variant reads of a layer's weights."""
    scales = scales_layout_of(variant, shape)
    return [layout_of(variant, shape), *([scales] if scales else [])]


def nbytes(shape: LinearShape, layout: str) -> list[int]:
    """Bytes of each weight of a site in a layout."""
    dtype = shape.weight_dtype
    size = (LAYOUTS[layout].dtype or dtype).itemsize
    return [math.prod(LAYOUTS[layout].shape(n, shape.k, dtype)) * size for n in shape.columns]


# --- rewriting -------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A piece ready to compile for one range."""

    piece: Piece
    sources: tuple[tuple[int, str], ...]
    """For each tensor input: which input of the original piece it is, in which layout."""

    @property
    def options(self) -> dict[str, Any]:
        """Inductor options that the piece needs."""
        if any(layout.startswith("onednn") for _, layout in self.sources):
            return {"size_asserts": False, "alignment_asserts": False}
        return {}


def unchanged(piece: Piece) -> Prepared:
    """The piece as it is."""
    return Prepared(piece, tuple((index, "plain") for index in range(len(piece.values))))


def rewrite(piece: Piece, bound: frozenset[int], chosen: Mapping[LinearShape, str]) -> Prepared:
    """Replace the linear layers of a piece by the variants chosen for their shapes.

    Shapes that are not in `chosen`, or have "inductor" there, keep what they are.
    """
    sites = [s for s in find(piece, bound) if chosen.get(s.shape, "inductor") in VARIANTS]
    if not sites:
        return unchanged(piece)
    kernels.load()
    rewriter = _Rewriter(piece)
    for site in sites:
        rewriter.replace(site, VARIANTS[chosen[site.shape]])
    names = ",".join(f"{site.weights}:{site.shape}:{chosen[site.shape]}" for site in sites)
    return rewriter.finish(names)


class _Rewriter:
    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.graph_module = copy.deepcopy(piece.graph_module)
        self.graph = self.graph_module.graph
        nodes = zip(piece.graph_module.graph.nodes, self.graph.nodes, strict=True)
        self.copies: dict[fx.Node, fx.Node] = dict(nodes)
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        self.tensors = placeholders[len(piece.takes) :]
        self.last = placeholders[-1]
        self.values = list(piece.values)
        self.sources = [(index, "plain") for index in range(len(self.values))]
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)

    def input(self, index: int, layout: str, n: int, shape: LinearShape) -> Any:
        """One of the piece's tensors in a layout."""
        source = (index, layout)
        if source not in self.sources:
            with self.graph.inserting_after(self.tensors[-1] if self.tensors else self.last):
                self.tensors.append(self.graph.placeholder(f"arg{len(self.tensors)}"))
            self.sources.append(source)
            value = self.piece.values[index]
            dims = LAYOUTS[layout].shape(n, shape.k, value.dtype)
            self.values.append(value.new_empty(dims, dtype=LAYOUTS[layout].dtype or value.dtype))
        return self.proxy(self.tensors[self.sources.index(source)])

    def proxy(self, node: fx.Node) -> Any:
        return fx.Proxy(node, self.tracer)

    def replace(self, site: Site, variant: Variant) -> None:
        shape, layout = site.shape, layout_of(variant, site.shape)
        indices = zip(site.weights, shape.columns, strict=True)
        weights = [self.input(index, layout, n, shape) for index, n in indices]
        own = scales_layout_of(variant, shape)
        indices = zip(site.weights if own else site.scales, shape.columns, strict=False)
        scales = [self.input(index, own or "float32", n, shape) for index, n in indices]
        biases = [self.proxy(self.copies[bias]) for bias in site.biases]
        with self.graph.inserting_before(self.copies[site.place]):
            x, residual = self.proxy(self.copies[site.x]), None
            if site.residual is not None:
                residual = self.proxy(self.copies[site.residual])
            invariant = variant.batch_invariant
            given = Layers(shape, weights, scales, biases, residual, invariant)
            made: list[Any] = variant.run(x, given)
        for old, new in zip(site.outputs, made, strict=True):
            copied, self.copies[old] = self.copies[old], new.node
            copied.replace_all_uses_with(new.node)
            self.erase(copied)

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing needs any more, and what only it needed."""
        if node.users or node.op == "placeholder":
            return
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for each in inputs:
            self.erase(each)

    def finish(self, names: str) -> Prepared:
        """The piece without weights that no layer reads in their own layout any more."""
        kept = [index for index, node in enumerate(self.tensors) if node.users]
        for node in self.tensors:
            if not node.users:
                self.graph.erase_node(node)
        self.graph_module.recompile()
        fingerprint = hashlib.sha256(f"{self.piece.fingerprint} {names}".encode()).hexdigest()[:16]
        piece = replace(
            self.piece,
            graph_module=self.graph_module,
            values=tuple(self.values[index] for index in kept),
            fingerprint=fingerprint,
        )
        return Prepared(piece, tuple(self.sources[index] for index in kept))
