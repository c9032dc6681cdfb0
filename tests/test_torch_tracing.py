"""What captures leave out, and what they say nevertheless."""

import pytest
import torch

from splitpoint import _torch
from splitpoint.graph.assumptions import read


def halves(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > 3:  # here
        return x.sin()
    return x.cos()


def lines_of(capture: _torch.DynamoCapture) -> list[str]:
    nodes = capture.graph_module.graph.nodes
    return [node.stack_trace or "" for node in nodes if node.op == "call_method"]


def captured() -> _torch.DynamoCapture:
    x = torch.ones(5, 2)
    _torch.mark_dynamic(x, 0)
    return _torch.dynamo_capture(halves, (x,), {})


def test_nodes_have_no_source_lines_but_assumptions_do() -> None:
    capture = captured()
    assert lines_of(capture) == [""]
    symbols = dict.fromkeys(capture.dimensions, _torch.size_symbol())
    found = {each.code: each.origin for each in read(capture.assumptions(symbols))}
    line = halves.__code__.co_firstlineno + 1
    assert f"test_torch_tracing.py:{line} in halves" in found["size > 3"]


def test_nodes_have_source_lines_where_torch_logs_are_on() -> None:
    torch._logging.set_logs(graph_code=True)
    try:
        (line,) = lines_of(captured())
    finally:
        torch._logging.set_logs()
    assert "x.sin()" in line


def test_dynamo_is_as_it_was_afterwards() -> None:
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    before = dict(vars(InstructionTranslatorBase))
    captured()
    with pytest.raises(_torch.DynamoFailure):
        _torch.dynamo_capture(lambda x: print(x), (torch.ones(2),), {})
    assert dict(vars(InstructionTranslatorBase)) == before
