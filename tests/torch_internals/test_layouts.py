"""Results that do not lie as torch says of them over symbolic sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from splitpoint.torch_internals.layouts import made_contiguous
from splitpoint.torch_internals.operators import op_name, operator_aliases
from splitpoint.torch_internals.sizes import symbols_in

NAMES = operator_aliases("aten::scaled_dot_product_attention")


def attention(x: torch.Tensor) -> torch.Tensor:
    query, key, value = (each.view(*x.shape[:2], 4, 8).transpose(1, 2) for each in x.chunk(3, -1))
    return F.scaled_dot_product_attention(query, key, value) + 1


def captured(x: torch.Tensor) -> tuple[fx.GraphModule, fx.Node]:
    found: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, _: object) -> object:
        found.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, (0, 1))
    torch.compile(attention, backend=keep)(x)
    (node,) = (node for node in found[0].graph.nodes if op_name(node.target) in NAMES)
    return found[0], node


def test_what_is_said_to_be_contiguous_and_is_not_is_copied() -> None:
    x = torch.randn(3, 7, 96)
    graph_module, node = captured(x)
    node.meta["example_value"] = torch.clone(
        node.meta["example_value"], memory_format=torch.contiguous_format
    )
    symbols = {each: each for each in symbols_in([node.meta["example_value"]])}
    (copy,) = made_contiguous(graph_module.graph, NAMES, symbols)
    assert [*node.users] == [copy]
    graph_module.recompile()
    between = fx.Interpreter(graph_module)
    between.garbage_collect_values = False
    sizes = [
        x if isinstance(each.meta["example_value"], torch.Tensor) else x.shape[dim]
        for dim, each in enumerate(graph_module.graph.find_nodes(op="placeholder"))
    ]
    (result,) = between.run(*sizes)
    assert between.env[copy].is_contiguous()
    assert not between.env[node].is_contiguous()
    torch.testing.assert_close(result, attention(x))


def test_what_lies_as_it_is_said_to_stays() -> None:
    graph_module, node = captured(torch.randn(3, 7, 96))
    symbols = {each: each for each in symbols_in([node.meta["example_value"]])}
    if torch.__version__ < (2, 15):
        assert made_contiguous(graph_module.graph, NAMES, symbols) == []
    assert made_contiguous(graph_module.graph, frozenset(), symbols) == []
