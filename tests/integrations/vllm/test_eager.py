"""Fewer steps to what a model of vLLM calls, where nothing compiles it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from splitpoint import kernels
from splitpoint.integrations.vllm import names
from splitpoint.kernels.memory import Streamed

from .starting import Answer, start

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed here: README, In vLLM, says how",
)


@pytest.fixture(autouse=True)
def loaded() -> None:
    kernels.load()


def test_a_compiler_keeps_what_it_sees() -> None:
    from vllm.config.compilation import CompilationMode

    from splitpoint.integrations.vllm.eager import runs_eagerly

    def config(mode: Any) -> Any:
        return SimpleNamespace(compilation_config=SimpleNamespace(mode=mode))

    assert runs_eagerly(config(CompilationMode.NONE))
    assert not runs_eagerly(config(CompilationMode.DYNAMO_TRACE_ONCE))
    assert not runs_eagerly(config(CompilationMode.VLLM_COMPILE))
    assert not runs_eagerly(None)


class Layer(nn.Module):
    def __init__(self, method: Any, cpu_linear: Any) -> None:
        super().__init__()
        self.quant_method, self.cpu_linear = method, cpu_linear
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def test_only_layers_on_these_kernels_are_applied_in_fewer_steps() -> None:
    from splitpoint.integrations.vllm.eager import shorten
    from splitpoint.integrations.vllm.kernel import Packed

    linear = names.LINEAR_METHOD.value

    class Other(linear):  # type: ignore[misc, valid-type]
        pass

    weight = torch.randn(48, 32)
    packed = Packed(weight, Streamed())
    ours, theirs = Layer(linear(), packed), Layer(linear(), nn.functional.linear)
    other = Layer(Other(), packed)
    shorten(nn.ModuleList([ours, theirs, other, nn.Linear(2, 2)]))
    assert type(theirs.quant_method) is linear
    assert type(other.quant_method) is Other
    assert type(ours.quant_method) is not linear
    assert isinstance(ours.quant_method, linear)  # as vLLM asks
    x, bias = torch.randn(3, 32), torch.randn(48)
    for given in (None, bias):
        made = ours.quant_method.apply(ours, x, given)
        torch.testing.assert_close(made, nn.functional.linear(x, weight, given))
    ours.weight = nn.Parameter(2 * weight, requires_grad=False)
    ours.cpu_linear = nn.functional.linear  # as vLLM sets it where weights are exchanged
    made = ours.quant_method.apply(ours, x, None)
    torch.testing.assert_close(made, nn.functional.linear(x, 2 * weight))


def test_attention_is_called_directly_where_vllm_leaves_a_choice() -> None:
    from splitpoint.integrations.vllm.eager import shorten

    attention = names.ATTENTION.owner

    def layer(**attributes: bool) -> nn.Module:
        made: nn.Module = attention.__new__(attention)  # what it is made of needs an engine
        nn.Module.__init__(made)
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    opaque, without, other = layer(use_direct_call=False), layer(), nn.Linear(2, 2)
    other.use_direct_call = False
    shorten(nn.ModuleList([opaque, without, other]))
    assert opaque.use_direct_call is True
    assert not hasattr(without, "use_direct_call")
    assert other.use_direct_call is False


@pytest.mark.slow
@pytest.mark.processes
def test_where_vllm_differs_linear_layers_and_norms_stay_fast(
    model: Path, cache: Path, own: Answer
) -> None:
    change = """if True:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    original = UnquantizedLinearMethod.apply
    UnquantizedLinearMethod.apply = lambda self, *rest, _call=original: _call(self, *rest)
    """
    answer = start(model, cache, before=change)
    assert answer.tokens == own.tokens
    assert (
        "a step stays as it is beside linear layers and norms, because of UnsupportedVllm"
        in answer.said
    )
    assert "norms by vLLM's kernels" in answer.said
    assert "packed kernels for linear layers" in answer.said
