"""`Config.batch_invariant`: a row has the same bits beside any others, or the model is refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitpoint import Config, compile
from splitpoint.errors import (
    ConfigError,
    GuardError,
    InvalidDynamicDims,
    InvalidField,
    NotBatchInvariant,
    UnsupportedOnDevice,
)
from splitpoint.kernels.devices import DEVICES, Device
from splitpoint.passes.batch_invariance import BatchInvariance

WIDTH = 96


class Block(nn.Module):
    """Norms, a gated network and a residual, over rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, dtype=dtype) for _ in range(2))
        self.gate = nn.Linear(WIDTH, 160, bias=False, dtype=dtype)
        self.up = nn.Linear(WIDTH, 160, bias=False, dtype=dtype)
        self.down = nn.Linear(160, WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return (torch.softmax(self.norms[1](x).float(), -1) * torch.exp(x.float())).to(x.dtype)


class Attention(nn.Module):
    """Attention of each sequence over itself, [batch, length, width]."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            each.view(batch, length, 4, WIDTH // 4).transpose(1, 2)
            for each in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def compiled(function: Callable[..., Any], **kwargs: Any) -> Any:
    dims = kwargs.pop("dynamic_dims", None)
    given = {"max_size": 512, "batch_invariant": True, "cache_dir": ""} | kwargs
    return compile(function, Config(**given), dynamic_dims=dims)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, "int8")],
)
def test_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype, weights: str | None):
    torch.manual_seed(0)
    fast = compiled(frozen(nn.Sequential(Block(dtype), Block(dtype))), weights=weights)
    rows = torch.randn(512, WIDTH).to(dtype)
    whole = fast(rows)
    chance = random.Random(0)
    for _ in range(1000):
        size = chance.choice((1, 2, 3, 5, 8, 13, 14, 15, 28, 64, chance.randint(1, 512)))
        taken = torch.tensor(chance.sample(range(512), size))
        assert torch.equal(fast(rows[taken]), whole[taken])
    assert [str(entry.range) for entry in fast.plan.entries] == ["[1,512]"]
    (chosen,) = {*fast.plan.entries[0].linear.values()}
    assert chosen == ("int8_invariant" if weights else "invariant")


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_attention_has_the_same_bits_in_any_batch(causal: bool):
    """Over the sequences of a batch; each head's keys are its own."""
    torch.manual_seed(0)
    model = frozen(Attention(causal))
    fast = compiled(model, max_size=64, dynamic_dims={"x": 0})
    sequences = torch.randn(64, 17, WIDTH)
    whole = fast(sequences)
    torch.testing.assert_close(whole, model(sequences))
    chance = random.Random(0)
    for _ in range(100):
        taken = torch.tensor(chance.sample(range(64), chance.randint(1, 64)))
        assert torch.equal(fast(sequences[taken]), whole[taken])


@pytest.mark.slow
def test_a_token_has_the_same_bits_whatever_comes_after_it():
    torch.manual_seed(0)
    fast = compiled(frozen(Attention(True)), max_size=64, dynamic_dims={"x": 1})
    tokens = torch.randn(1, 64, WIDTH)
    whole = fast(tokens)
    for size in (1, 2, 3, 7, 16, 17, 63):
        assert torch.equal(fast(tokens[:, :size]), whole[:, :size])


@pytest.mark.slow
def test_threads_change_no_bit():
    torch.manual_seed(0)
    model = frozen(Block(torch.bfloat16))
    rows = torch.randn(300, WIDTH).to(torch.bfloat16)
    one = compiled(model)
    alone = [one(rows[:size]) for size in (1, 7, 300)]
    torch.set_num_threads(2)
    two = compiled(model)
    for result in alone:
        assert torch.equal(two(rows[: len(result)]), result)


def product(x: Tensor) -> Tensor:
    return x @ x.T


def bilinear(x: Tensor) -> Tensor:
    return F.bilinear(x, x, torch.ones(3, WIDTH, WIDTH))


def solved(x: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(WIDTH) + 1, x.T).T


def inverted(x: Tensor) -> Tensor:
    return x * torch.linalg.inv(torch.eye(WIDTH) + x[:1].sum())[0]


def attends(scale: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def attend(x: Tensor) -> Tensor:
        q = x.to(dtype).view(1, -1, 4, WIDTH // 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, scale=scale).transpose(1, 2).flatten(2)[0]

    return attend


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "says"),
    [
        (bilinear, "is aten::_trilinear, and a library divides this product"),
        (solved, "is aten::_linalg_solve_ex, and a library divides this by"),
        (inverted, "is aten::linalg_inv_ex, and a library divides this by"),
        (product, "is aten::mm, and a library divides this product"),
        (attends(-1.0, torch.float32), "attention .* stays torch's, and a library divides this"),
        (attends(1.0, torch.float64), "attention 4 heads of 24.* stays torch's"),
    ],
)
def test_what_varies_is_refused_by_name(function: Callable[..., Any], says: str):
    with pytest.raises(NotBatchInvariant, match=says) as refused:
        compiled(function)(torch.randn(5, WIDTH))
    assert str(refused.value).count("\n") == 2


@pytest.mark.slow
def test_several_dimensions_are_refused():
    fast = compiled(frozen(Block(torch.float32)), dynamic_dims={"x": {0: "batch", 1: "length"}})
    with pytest.raises(InvalidDynamicDims, match="is for one dynamic dimension, got batch, length"):
        fast(torch.randn(2, 3, WIDTH))


@pytest.mark.slow
def test_a_model_that_needs_two_graphs_is_refused():
    def branches(x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] < 12 else x - 1

    with pytest.raises(GuardError, match="batch_invariant=True needs one graph for all sizes"):
        compiled(branches)(torch.randn(5, WIDTH))


@pytest.mark.slow
def test_a_product_over_one_k_is_none():
    def angles(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[0]).float()[None, None]
        frequencies = torch.linspace(1, 0, WIDTH)[None, :, None]
        return x * (frequencies @ positions)[0].T.cos()

    fast = compiled(angles)
    x = torch.randn(40, WIDTH)
    torch.testing.assert_close(fast(x), angles(x))
    assert torch.equal(fast(x[:3]), fast(x)[:3])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"split_points": [8]}, "batch_invariant=True needs split_points=(), got (8,)"),
        ({"compile_sizes": [1]}, "batch_invariant=True needs compile_sizes=(), got (1,)"),
        ({"backend": "eager"}, "batch_invariant=True needs backend='inductor', got 'eager'"),
        ({"weights": "int4"}, "batch_invariant=True needs weights=None or 'int8', got 'int4'"),
        ({"linear": "inductor"}, "batch_invariant=True needs linear='auto', got 'inductor'"),
        ({"background": True}, "batch_invariant=True needs background=False, got True"),
        ({"on_out_of_plan": "eager"}, "needs on_out_of_plan='error', got 'eager'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(other: dict[str, Any], says: str):
    with pytest.raises(InvalidField, match=re.escape(says)):
        Config(batch_invariant=True, **other)


def test_it_is_written_and_read():
    config = Config(batch_invariant=True)
    assert (config.on_guard, config.on_break) == ("error", "error")
    assert BatchInvariance() in config.passes
    assert Config.from_json(config.to_json()) == config
    assert BatchInvariance() not in Config().passes
    with pytest.raises(ConfigError, match="batch_invariant must be True or False"):
        Config(batch_invariant=1)  # type: ignore[arg-type]


def test_other_devices_refuse_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(DEVICES, "cpu", Device("cpu"))
    with pytest.raises(UnsupportedOnDevice, match="batch_invariant=True asks for kernels that add"):
        compiled(frozen(Block(torch.float32)))(torch.randn(2, WIDTH))
