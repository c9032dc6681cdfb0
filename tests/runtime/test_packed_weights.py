"""Packed copies follow their weights, and what is not seen can be said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from splitpoint import Config, compile

CONFIG = Config(max_size=16, linear={"1-16": "packed"}, cache_dir="")


def made(width: int = 64, inner: int = 256) -> nn.Sequential:
    layers = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def exchange(model: nn.Sequential) -> None:
    weight = model[0].weight
    shape = weight.shape
    weight.data = torch.empty(0)
    weight.data = torch.randn(shape)  # may lie where the first one did


def there_and_back(model: nn.Sequential) -> None:
    model.half().float()


@pytest.mark.parametrize("change", [exchange, there_and_back])
@pytest.mark.parametrize(("width", "inner"), [(64, 256), (256, 512), (64, 4096)])
def test_data_that_is_exchanged_is_followed(change: Callable, width: int, inner: int) -> None:
    model = made(width, inner)
    compiled = compile(model, CONFIG)
    x = torch.randn(3, width)
    compiled(x)
    for _ in range(3):
        change(model)
        expected = model(x)
        # Sums of `inner` products in two orders; a stale weight is thirty times away or more.
        order = inner**0.5 * torch.finfo(x.dtype).eps * expected.abs().max()
        assert_close(compiled(x), expected, rtol=1.3e-6, atol=float(order))


def add_to_data(weight: Tensor) -> None:
    weight.data += 0.5


def write_to_array(weight: Tensor) -> None:
    weight.detach().numpy()[:] += 0.5


@pytest.mark.parametrize("change", [add_to_data, write_to_array])
def test_what_torch_does_not_count_is_packed_when_it_is_said(change: Callable) -> None:
    model = made()
    compiled = compile(model, CONFIG)
    x = torch.randn(3, 64)
    compiled(x)
    change(model[0].weight)
    compiled.repack()
    assert_close(compiled(x), model(x))


def test_repack_before_the_first_call_and_of_freed_weights() -> None:
    model = made()
    expected = made()
    expected.load_state_dict(model.state_dict())
    compiled = compile(
        model,
        CONFIG,
    )
    compiled.repack()
    freeing = compile(
        model, Config(max_size=16, linear={"1-16": "packed"}, free_original_weights=True)
    )
    x = torch.randn(3, 64)
    assert_close(freeing(x), expected(x))
    freeing.repack()
    assert_close(freeing(x), expected(x))


def test_the_memory_of_freed_weights_is_not_held() -> None:
    model = made()
    memory = StorageWeakRef(model[0].weight.untyped_storage())
    compiled = compile(
        model, Config(max_size=16, linear={"1-16": "packed"}, free_original_weights=True)
    )
    compiled(torch.randn(3, 64))
    assert memory.expired()


@pytest.mark.parametrize("config", [CONFIG, Config(max_size=16, cache_dir="")])
def test_weights_made_in_inference_mode_are_served(config: Config) -> None:
    with torch.inference_mode():
        model = made()
        compiled = compile(model, config)
        x = torch.randn(3, 64)
        assert_close(compiled(x), model(x))
        model[0].weight.add_(0.5)
        compiled.repack()
        assert_close(compiled(x), model(x))
    assert_close(compiled(x), model(x))
