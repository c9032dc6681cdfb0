"""vLLM's own kernels for norms, called in the place of torch's operators."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from splitpoint.integrations.vllm import norms

from .starting import Answer, start

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed here: README, In vLLM, says how",
)

DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def library() -> Any:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return norms.Norms()  # vLLM's table takes a name once


def tensors(rows: int, size: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, size), (rows, size), (size,)]
    return [torch.randn(shape, generator=generator).mul(3).to(dtype) for shape in shapes]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def is_near(made: Tensor, exact: Tensor, roundings: int) -> bool:
    relative = roundings * norms.ROUNDOFF[made.dtype] + (made.shape[-1] + 8) * norms.U32
    return bool(((made.double() - exact).abs() <= relative * exact.abs() + 1e-30).all())


@given(
    rows=st.integers(0, 70),
    size=st.integers(1, 40).map(lambda count: count * norms.MULTIPLE),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_kernels_give_what_float64_gives(
    library: norms.Norms, rows: int, size: int, dtype: torch.dtype, eps: float, seed: int
) -> None:
    x, residual, weight = tensors(rows, size, dtype, seed)
    before = x.clone()
    torch.full_like(x, torch.nan)  # what the next empty tensor finds in memory
    assert is_near(norms.rms_norm(x, weight, eps), reference(x, weight, eps), 3)
    assert torch.equal(x, before)
    summed = x.double() + residual.double()
    norm, made = norms.fused_add_rms_norm(x, residual, weight, eps)
    assert made is residual
    assert is_near(made, summed, 1)
    assert is_near(norm, reference(summed, weight, eps), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_the_kernels_do_not_take_are_left(
    library: norms.Norms, dtype: torch.dtype
) -> None:
    assert norms.is_right(64, dtype)
    assert not norms.is_right(100, dtype)
    assert not norms.is_right(7, dtype)


def test_a_wrong_kernel_is_seen(library: norms.Norms, monkeypatch: pytest.MonkeyPatch) -> None:
    right = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda *args: right(*args) * 1.02)
    assert not norms.is_right(64, torch.bfloat16)


def test_vllm_calls_them_for_what_they_take_and_its_own_else(
    library: norms.Norms, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import ir
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    monkeypatch.setattr(library, "_is_better", lambda size, dtype: size != 48)
    with set_current_vllm_config(VllmConfig()):
        model = nn.ModuleList([RMSNorm(64), RMSNorm(64), RMSNorm(48), nn.LayerNorm(64)])
    assert library.take_over(model) == "norms by vLLM's kernels in C++: 2 of 64 fp32"
    taken = {
        "plain": (torch.randn(3, 64), torch.ones(64), 1e-5),
        "3-D": (torch.randn(3, 2, 64), torch.ones(64), 1e-5),
    }
    left = {
        "size": (torch.randn(3, 48), torch.ones(48), 1e-5),
        "strides": (torch.randn(3, 128)[:, :64], torch.ones(64), 1e-5),
        "no weight": (torch.randn(3, 64), None, 1e-5),
        "dtypes": (torch.randn(3, 64).bfloat16(), torch.ones(64), 1e-5),
        "part": (torch.randn(3, 64), torch.ones(64), 1e-5, 32),
    }
    for name, given_ in {**taken, **left}.items():
        assert (ir.ops.rms_norm.dispatch(*given_).provider == norms.PROVIDER) == (name in taken)
        native = ir.ops.rms_norm.impls["native"].impl_fn(*given_)
        torch.testing.assert_close(ir.ops.rms_norm(*given_), native)
        x, *rest = given_
        residual = torch.randn_like(x)
        both = (x, residual, *rest)
        op = ir.ops.fused_add_rms_norm
        assert (op.dispatch(*both).provider == norms.PROVIDER) == (name in taken)
        native = op.impls["native"].impl_fn(*both)
        kept = x.clone(), residual.clone()
        torch.testing.assert_close(op(*both), native)  # which writes over nothing
        assert torch.equal(x, kept[0])
        assert torch.equal(residual, kept[1])


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("fails", [False, True])
def test_an_engine_says_the_same_with_them_and_where_vllms_table_differs(
    model: Path, cache: Path, own: Answer, fails: bool
) -> None:
    change = """if True:
    from vllm.ir.op import IrOp
    original = IrOp.set_default
    IrOp.set_default = lambda self, names, _call=original: _call(self, names)
    """
    answer = start(model, cache, **({"before": change} if fails else {}))
    assert answer.tokens == own.tokens
    assert ("norms by vLLM's kernels in C++: 5 of 128 fp32" in answer.said) != fails
    assert ("vLLM's own norms are used, because of UnsupportedVllm" in answer.said) == fails
    assert "packed kernels for linear layers" in answer.said
