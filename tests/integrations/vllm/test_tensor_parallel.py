"""Sums in place over ranks become values of a graph: in graphs as Dynamo makes them of vLLM's
calls, with an operator of vLLM's name whose sum is known without other ranks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from splitpoint.integrations.vllm.tensor_parallel import Ranks, left, replace, said
from splitpoint.ranges import Range

RANKS = Ranks("group", 7)


def _times(handle, data):
    data.mul_(handle)


_library = torch.library.Library("_C", "FRAGMENT")
if not hasattr(torch.ops._C, "shm_allreduce"):
    _library.define("shm_allreduce(int handle, Tensor(a!) data) -> ()")
_library.impl("shm_allreduce", _times, "CPU")
torch.library.register_fake("_C::shm_allreduce", lambda handle, data: None, lib=_library)


def vllm_reduce(x, handle=7):
    torch.ops._C.shm_allreduce(handle, x)
    return x


def layer(x, weight, residual):
    residual = vllm_reduce(F.linear(x, weight)) + residual
    return residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-5), residual


def two_layers(x, weight, residual):
    x, residual = layer(x, weight, residual)
    return layer(x, weight, residual)


def made_before(x, weight, residual):
    out = torch.empty_like(residual)  # as vLLM's own linear layers do
    torch.mm(x, weight.t(), out=out)
    return vllm_reduce(out) + residual


def twice(x, weight, residual):
    return vllm_reduce(vllm_reduce(x @ weight)) + residual


def read_before(x, weight, residual):
    y = x @ weight
    before = y.sum() + residual
    return vllm_reduce(y) + before


def viewed_after(x, weight, residual):
    return vllm_reduce(x @ weight).view(-1).sum() + residual


def of_a_view(x, weight, residual):
    return vllm_reduce((x @ weight).view(-1, 2)).view_as(residual) + residual


def seen_through_a_view(x, weight, residual):
    y = x @ weight
    view = y[:1]
    return vllm_reduce(y) + view


def seen_through_its_base(x, weight, residual):
    y = x @ weight
    vllm_reduce(y[:1])
    return y + residual


def of_an_argument(x, weight, residual):
    return vllm_reduce(x) + residual


def of_another_group(x, weight, residual):
    return vllm_reduce(x @ weight, 5) + residual


REPLACED = {
    layer: 1,
    two_layers: 2,
    made_before: 1,
    twice: 2,
    read_before: 1,
    viewed_after: 1,
    of_a_view: 1,
    seen_through_a_view: 0,
    seen_through_its_base: 0,
    of_an_argument: 0,
    of_another_group: 0,
}
"""How many sums of each function can be values."""


def as_if_all_had_come(x, group):
    assert group == RANKS.group
    return x * RANKS.handle


@settings(max_examples=3, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_what_is_computed_stays(rows, seed):
    torch.manual_seed(seed)
    inputs = [torch.randn(rows, 4), torch.randn(4, 4), torch.randn(rows, 4)]
    for function, expected in REPLACED.items():
        torch._dynamo.reset()
        graphs = []

        def keep(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        want = torch.compile(function, backend=keep, fullgraph=True)(*(t.clone() for t in inputs))
        (graph,) = graphs
        assert replace(graph.graph, RANKS) == expected, function.__name__
        graph.graph.lint()
        for node in graph.graph.nodes:
            if node.target is torch.ops.splitpoint.all_reduce.default:
                node.target = as_if_all_had_come
        assert left(graph.graph) == (None if expected else "1 all-reduces of vLLM's own")
        graph.recompile()
        given_ = dict(zip(("l_x_", "l_weight_", "l_residual_"), inputs, strict=True))
        order = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        got = graph(*(given_[name].clone() for name in order))
        got = got if isinstance(want, tuple) else got[0]
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=function.__name__)


def test_the_line_of_the_log():
    assert said({Range(9, 64): 5, Range(1, 8): 5}, 5) == (
        "5 all-reduces over its shared memory; fused with a norm: 5 in [1,8], 5 in [9,64]"
    )
    assert said({}, 5).endswith("fused with a norm: none")
