"""Where each leaf of what a callable returns comes from, and how they nest.

Dynamo puts into its graph what has to be computed, and writes code that builds the result from the
graph's outputs and from what it finds elsewhere: an argument, a tensor of the module, an attribute
of either (`x.T`). That code is run once for arguments whose size is a symbol, so that what follows
from the size cannot pass for a constant; it becomes an output of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError, OutsideGraph, SplitpointError, UnsupportedGraph
from ..torch_internals.containers import tree_flatten
from ..torch_internals.dynamo import DynamoCapture
from ..torch_internals.sizes import (
    Extent,
    Symbols,
    expression_of,
    in_terms_of_size,
    python_code,
    range_shapes,
)
from ..torch_internals.tensors import memory_of
from .dims import Lengths
from .leaves import PLAIN, TensorLeaf
from .signature import Signature
from .sources import Argument, Bound, GraphOutput, Integer, Shape, SizeInput


class Result:
    """The leaves of a callable's result. Making one adds outputs to the graph where it has to."""

    def __init__(
        self,
        dynamo: DynamoCapture,
        signature: Signature,
        lengths: Lengths,
        tensors: Sequence[torch.Tensor],
        inputs: Sequence[Argument | Bound | SizeInput],
        values: Sequence[Any],
        symbols: Symbols,
    ) -> None:
        """
        Args:
            dynamo: the capture.
            signature: of the call that was captured.
            lengths: of its dynamic dimensions, at which it was.
            tensors: the tensor arguments of that call.
            inputs: where the graph's inputs come from.
            values: what they were.
            symbols: what those of the graph mean.

        Raises:
            UnsupportedGraph: for a result that cannot be made anew at another size.
        """
        self.graph = dynamo.graph_module.graph
        self.inputs = inputs
        self.placeholders = self.graph.find_nodes(op="placeholder")
        self.symbols = symbols
        self.dims = signature.dims
        # The shape of an argument that the graph does not take follows from the size too.
        named = zip(self.dims.names, lengths, strict=True)
        self.shapes = range_shapes([Extent(name, 1, _ANY, n) for name, n in named])
        stand_ins: list[Any] = [self._stand_in(leaf) for leaf in signature.tensors]
        for source, value in zip(inputs, dynamo.placeholders, strict=True):
            if isinstance(source, Argument):
                stand_ins[source.index] = value
        self.arguments = {id(tensor): index for index, tensor in enumerate(tensors)}
        self.arguments |= {id(value): index for index, value in enumerate(stand_ins)}
        self.bound = {
            id(value): node
            for source, node, value in zip(inputs, self.placeholders, values, strict=True)
            if isinstance(source, Bound)
        }
        self.memory: dict[int | None, list[tuple[fx.Node, torch.Tensor]]] = {}
        """The inputs that are in some memory, by what `memory_of` says of it."""
        for source, node, value in zip(inputs, self.placeholders, values, strict=True):
            if isinstance(source, Bound):
                self.memory.setdefault(memory_of(value), []).append((node, value))
            elif isinstance(source, Argument):
                value = node.meta["example_value"]
                self.memory.setdefault(memory_of(value), []).append((node, value))
        outputs = self.graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        self.outputs = list(outputs)
        probes = [_probe(node, index) for index, node in enumerate(self.outputs)]
        self.output_of = {id(probe): index for index, probe in enumerate(probes)}
        args, kwargs = signature.with_tensors(lengths, stand_ins)

        def run() -> tuple[list[Any], Any]:
            try:
                made = dynamo.result(probes, args, kwargs)
            except SplitpointError:
                raise
            except Exception as error:  # whatever the model's own code makes of a stand-in
                raise OutsideGraph(
                    f"the model does more with what it computed than return it "
                    f"({type(error).__name__}: {error}): return the tensor, or the size itself"
                ) from error
            # torch's trees would make a tuple of a torch.Size.
            return tree_flatten(made, is_leaf=lambda value: isinstance(value, torch.Size))

        self._run = run
        found, self.spec = run()
        self.returned: list[int] = []
        """Leaves that are tensors of the module which the graph does not take."""
        self.leaves = tuple(self._leaf(index, value) for index, value in enumerate(found))
        self.graph.output_node().args = (tuple(self.outputs),)

    def fetch_returned(self) -> list[Any]:
        """The tensors of the module that are returned as they are, as it holds them now."""
        if not self.returned:
            return []
        leaves, _ = self._run()
        return [leaves[index] for index in self.returned]

    def _leaf(self, index: int, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(index, value)
        if isinstance(value, torch.SymInt):
            return self._integer(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise UnsupportedGraph(
                f"the model returns a {type(value).__name__.removeprefix('Sym').lower()} that "
                f"follows from the size ({value}): return the size, or a tensor"
            )
        if isinstance(value, int) and value >= _FIRST_PROBE:
            return GraphOutput(value - _FIRST_PROBE)
        if isinstance(value, torch.Size):
            return Shape(tuple(self._leaf(index, part) for part in value))
        if not _is_constant(value) and self._run()[0][index] is not value:
            # An iterator would come out of torch.compile as one of another class.
            kind = CaptureError if isinstance(value, Iterator) else OutsideGraph
            raise kind(
                f"the model returns a {type(value).__name__} that it makes at each call, and that "
                f"torch cannot take apart: return a tuple, list, dict or NamedTuple, or register "
                f"the class (torch.export.register_dataclass)"
            )
        return value

    def _stand_in(self, leaf: TensorLeaf) -> torch.Tensor:
        """An argument of which the dynamic dimensions are symbols."""
        lengths = self.shapes.lengths
        strides = []
        for dim in range(len(leaf.shape)):
            factor, powers = leaf.stride_at(dim, len(lengths))
            grown = [n**power for n, power in zip(lengths, powers, strict=True)]
            strides.append(math.prod([factor, *grown]))
        dynamic = leaf.dynamic
        shape = [lengths[dynamic[d]] if d in dynamic else n for d, n in enumerate(leaf.shape)]
        with torch.inference_mode(False), self.shapes.fake_mode:
            return torch.empty_strided(shape, strides, dtype=leaf.dtype, device=leaf.device)

    def _tensor(self, index: int, value: torch.Tensor) -> GraphOutput | Argument | Bound:
        if id(value) in self.output_of:
            return GraphOutput(self.output_of[id(value)])
        if id(value) in self.arguments:
            return Argument(self.arguments[id(value)])
        if id(value) in self.bound:
            return self._output(self.bound[id(value)])
        if self._run()[0][index] is value:
            self.returned.append(index)
            bound = sum(isinstance(source, Bound) for source in self.inputs)
            return Bound(bound + len(self.returned) - 1)
        memory = memory_of(value)
        of = [node for node, whole in self.memory.get(memory, ()) if _starts_in(whole, value)]
        if memory is None or not of:
            raise UnsupportedGraph(
                f"the model returns a tensor {tuple(value.shape)} that is made anew from one that "
                f"it does not compute with: return that one itself, or a copy"
            )
        with self.graph.inserting_before(self.graph.output_node()):
            # Only its kind counts: views of inputs are made outside of compiled code.
            node = self.graph.call_function(torch.ops.aten.alias.default, (of[0],))
        node.meta["example_value"] = _view(of[0].meta["example_value"], value)
        return self._output(node)

    def _integer(self, value: torch.SymInt) -> Integer:
        own = value.node.shape_env is self.shapes.env
        expr = expression_of(value)
        assert expr is not None
        expr = in_terms_of_size(expr, self.shapes.symbols if own else self.symbols)
        if not expr.free_symbols <= set(self.dims.symbols):
            raise OutsideGraph(
                f"the model returns an integer that is known only when it runs ({value}): return "
                f"the tensor that it is read from"
            )
        return Integer(python_code(expr))

    def _output(self, node: fx.Node) -> GraphOutput:
        self.outputs.append(node)
        return GraphOutput(len(self.outputs) - 1)


def _view(of: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The captured value of a view of an input; `value` may be a real tensor of the module."""
    if memory_of(of) == memory_of(value):
        return value
    flat = of.as_strided((of.untyped_storage().nbytes() // of.element_size(),), (1,), 0)
    if value.dtype != of.dtype:
        flat = flat.view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


def _starts_in(whole: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether a view starts in the tensor whose memory it is in; one of an argument does."""
    ahead = view.storage_offset() * view.element_size()
    ahead -= whole.storage_offset() * whole.element_size()
    return isinstance(ahead, torch.SymInt) or ahead >= 0


def _probe(node: Any, index: int) -> Any:
    """What stands for a graph output."""
    if isinstance(node, fx.Node) and isinstance(node.meta["example_value"], torch.Tensor):
        return torch.empty(0)
    return _FIRST_PROBE + index


def _is_constant(value: object) -> bool:
    """Whether a value that is made at each call may as well be made once."""
    if isinstance(value, (range, slice)):
        return all(_is_constant(each) for each in (value.start, value.stop, value.step))
    if isinstance(value, frozenset):
        return all(map(_is_constant, value))
    return isinstance(value, PLAIN) and not (isinstance(value, int) and value >= _FIRST_PROBE)


_ANY = 2**31
"""No length is greater."""

_FIRST_PROBE = 7_919_000_000_000
"""Stands, with those above it, for integers that the graph returns; no real size is near."""
