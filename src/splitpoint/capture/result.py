"""Where each leaf of what a callable returns comes from, and how they nest.

Dynamo puts into its graph what has to be computed, and writes code that builds the result from the
graph's outputs and from what it finds elsewhere: an argument, a tensor of the module, an attribute
of either (`x.T`). That code is run once for arguments whose size is a symbol, so that what follows
from the size cannot pass for a constant; it becomes an output of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..errors import SplitpointError, UnsupportedGraph
from ..torch_internals.containers import tree_flatten
from ..torch_internals.dynamo import DynamoCapture
from ..torch_internals.sizes import expression_of
from ..torch_internals.tensors import memory_of
from .dims import Lengths
from .signature import Signature
from .sources import Argument, Bound, GraphOutput, SizeInput


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
    ) -> None:
        """
        Args:
            dynamo: the capture.
            signature: of the call that was captured.
            lengths: of its dynamic dimensions, at which it was.
            tensors: the tensor arguments of that call.
            inputs: where the graph's inputs come from.
            values: what they were.

        Raises:
            UnsupportedGraph: for a result that cannot be made anew at another size.
        """
        self.graph = dynamo.graph_module.graph
        self.inputs = inputs
        self.placeholders = self.graph.find_nodes(op="placeholder")
        stand_ins: list[Any] = list(tensors)
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
        self.memory: dict[int | None, fx.Node] = {}
        """The input that is in some memory, by what `memory_of` says of it."""
        for source, node, value in zip(inputs, self.placeholders, values, strict=True):
            if isinstance(source, Bound):
                self.memory.setdefault(memory_of(value), node)
            elif isinstance(source, Argument):
                self.memory.setdefault(memory_of(node.meta["example_value"]), node)
        outputs = self.graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        self.outputs = list(outputs)
        probes = [_probe(node, index) for index, node in enumerate(self.outputs)]
        self.output_of = {id(probe): index for index, probe in enumerate(probes)}
        args, kwargs = signature.with_tensors(lengths, stand_ins)

        def run() -> tuple[list[Any], Any]:
            try:
                result = dynamo.result(probes, args, kwargs)
            except SplitpointError:
                raise
            except Exception as error:  # whatever the model's own code makes of a stand-in
                raise UnsupportedGraph(
                    f"the model does more with what it computed than return it "
                    f"({type(error).__name__}: {error}): leave that to the caller"
                ) from error
            leaves, spec = tree_flatten(result)
            return leaves, spec

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
        if isinstance(value, tuple) and any(
            isinstance(part, torch.SymInt) or (isinstance(part, int) and part >= _FIRST_PROBE)
            for part in value
        ):
            raise UnsupportedGraph(
                f"the model returns a {type(value).__name__} that holds the size: return the "
                f"integers, or the tensor itself"
            )
        return value

    def _tensor(self, index: int, value: torch.Tensor) -> GraphOutput | Argument | Bound:
        if id(value) in self.output_of:
            return GraphOutput(self.output_of[id(value)])
        if id(value) in self.arguments:
            return Argument(self.arguments[id(value)])
        if id(value) in self.bound:
            return self._output(self.bound[id(value)])
        memory = memory_of(value)
        if memory is not None and (of := self.memory.get(memory)) is not None:
            with self.graph.inserting_before(self.graph.output_node()):
                # Only its kind counts: views of inputs are made outside of compiled code.
                node = self.graph.call_function(torch.ops.aten.alias.default, (of,))
            node.meta["example_value"] = _view(of.meta["example_value"], value)
            return self._output(node)
        if self._run()[0][index] is not value:
            raise UnsupportedGraph(
                f"the model returns a tensor {tuple(value.shape)} that is made anew from one that "
                f"it does not compute with: return that one itself, or a copy"
            )
        self.returned.append(index)
        bound = sum(isinstance(source, Bound) for source in self.inputs)
        return Bound(bound + len(self.returned) - 1)

    def _integer(self, value: torch.SymInt) -> GraphOutput:
        wanted = expression_of(value)
        for node in self.graph.nodes:
            if expression_of(node.meta.get("example_value")) == wanted:
                return self._output(node)
        raise UnsupportedGraph(
            f"the model returns an integer that follows from the size ({wanted}) and that it does "
            f"not compute with: return the size itself"
        )

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


def _probe(node: Any, index: int) -> Any:
    """What stands for a graph output."""
    if isinstance(node, fx.Node) and isinstance(node.meta["example_value"], torch.Tensor):
        return torch.empty(0)
    return _FIRST_PROBE + index


_FIRST_PROBE = 7_919_000_000_000
"""Stands, with those above it, for integers that the graph returns; no real size is near."""
