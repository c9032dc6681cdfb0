"""What one run of Dynamo gives, and that it leaves torch as it was."""

import pytest
import torch

from splitpoint.capture.assumptions import read
from splitpoint.torch_internals.dynamo import (
    DynamoCapture,
    DynamoFailure,
    dynamo_capture,
    mark_dynamic,
)
from splitpoint.torch_internals.sizes import size_symbol


def halves(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > 3:  # here
        return x.sin()
    return x.cos()


def captured() -> DynamoCapture:
    x = torch.ones(5, 2)
    mark_dynamic(x, 0)
    return dynamo_capture(halves, (x,), {})


def test_assumptions_say_where_they_come_from() -> None:
    capture = captured()
    symbols = dict.fromkeys(capture.dimensions, size_symbol())
    found = {each.code: each.origin for each in read(capture.assumptions(symbols))}
    line = halves.__code__.co_firstlineno + 1
    assert f"test_dynamo.py:{line} in halves" in found["size > 3"]


def test_dynamo_is_as_it_was_afterwards() -> None:
    import torch._dynamo.config as config

    before = config.get_config_copy()
    captured()
    with pytest.raises(DynamoFailure):
        dynamo_capture(lambda x: print(x), (torch.ones(2),), {})
    assert config.get_config_copy() == before
