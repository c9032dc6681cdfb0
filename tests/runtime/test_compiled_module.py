"""A compiled module as a module: a child, moved, saved, hooked, copied and pickled."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import splitpoint
from splitpoint import CompiledModule, Config, errors

CONFIG = Config(max_size=64, split_points=[8], cache_dir="")
PLAIN = Config(max_size=64, split_points=[8], cache_dir="", backend="eager")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.ones(4))
        self.moves = 0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        return self.norm(self.linear(x) * scale + self.shift)

    def double(self: Any) -> Any:
        """A method of `nn.Module` that a class has for itself."""
        self.moves += 1
        return super().double()


def block() -> Any:
    return Block().eval().requires_grad_(False)


def test_as_a_child_it_is_seen_under_its_own_names() -> None:
    module = block()
    compiled = splitpoint.compile(module, CONFIG)
    parent = nn.Sequential(compiled, nn.ReLU())
    x = torch.randn(3, 8)
    assert_close(parent(x), module(x).relu())
    assert isinstance(compiled, nn.Module)
    assert isinstance(compiled, CompiledModule)
    assert list(compiled.state_dict()) == list(module.state_dict())
    assert list(parent.state_dict()) == [f"0.{name}" for name in module.state_dict()]
    assert [name for name, _ in parent.named_modules()] == ["", "0", "0.linear", "0.norm", "1"]
    assert parent.get_submodule("0") is compiled
    assert list(parent.parameters()) == list(module.parameters())
    assert list(parent.buffers()) == list(module.buffers())
    assert list(compiled.children()) == [module.linear, module.norm]


def test_what_is_done_to_a_parent_reaches_the_module() -> None:
    module = block()
    compiled = splitpoint.compile(module, CONFIG)
    parent = nn.Sequential(compiled, nn.ReLU())
    x = torch.randn(3, 8)
    parent(x)
    parent.load_state_dict({name: value + 1 for name, value in parent.state_dict().items()})
    assert_close(parent(x), module(x).relu())
    parent.train()
    assert all(each.training for each in (module, compiled, module.norm))
    parent.eval()
    assert not any(each.training for each in (module, compiled))
    parent.requires_grad_(True)
    assert all(each.requires_grad for each in module.parameters())
    parent.requires_grad_(False)
    seen: list[nn.Module] = []
    parent.apply(seen.append)
    assert module.linear in seen
    assert parent.to(torch.bfloat16) is parent
    assert module.linear.weight.dtype is torch.bfloat16
    assert compiled.double() is compiled
    assert module.moves == 1
    assert compiled.half() is compiled
    assert module.shift.dtype is torch.float16


def test_hooks_run_around_each_call_and_can_be_removed() -> None:
    module = block()
    compiled = splitpoint.compile(module, CONFIG)
    x = torch.randn(3, 8)
    compiled(x)
    seen: list[Any] = []

    def after(owner: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
        seen.append((owner, args[0].shape, result.shape))
        return result + 1

    handles = [
        compiled.register_forward_hook(after),
        compiled.register_forward_pre_hook(lambda owner, args: (args[0] * 2,)),
    ]
    assert_close(compiled(x, scale=0.5), module(x * 2, scale=0.5) + 1)
    assert seen == [(compiled, (3, 8), (3, 4))]
    copied = copy.deepcopy(compiled)
    assert_close(copied(x), module(x * 2) + 1)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    assert_close(compiled(x), module(x))
    assert len(seen) == 2


def test_hooks_that_the_module_had_are_part_of_what_is_captured() -> None:
    module = block()
    module.register_forward_hook(lambda owner, args, result: result * 3)
    x = torch.randn(3, 8)
    want = module(x)
    assert_close(splitpoint.compile(module, CONFIG)(x), want)


def test_copies_have_weights_of_their_own() -> None:
    module = block()
    compiled = splitpoint.compile(module, CONFIG)
    parent = nn.Sequential(compiled, nn.ReLU())
    x = torch.randn(3, 8)
    want = parent(x)
    copied = copy.deepcopy(parent)
    assert copied[0].module is not module
    with torch.no_grad():
        module.linear.weight.zero_()
    assert_close(copied(x), want)
    assert copy.copy(compiled).module is module


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        Config(
            max_size=64,
            split_points=[8],
            cache_dir="",
            inductor_options={"1-8": {"max_autotune": False}},
            linear={"1-8": "inductor"},
        ),
    ],
)
def test_pickled_it_is_compiled_anew(config: Config) -> None:
    module = block()
    compiled = splitpoint.compile(module, config, dynamic_dims={"x": {0: torch.export.Dim("n")}})
    x = torch.randn(3, 8)
    want = compiled(x)
    again = pickle.loads(pickle.dumps(compiled))
    assert again.stats().captures == 0
    assert_close(again(x), want)
    assert again.config == config
    file = io.BytesIO()
    torch.save(nn.Sequential(compiled), file)
    file.seek(0)
    assert_close(torch.load(file, weights_only=False)(x), want)


def test_pickled_it_comes_back_through_the_store(tmp_path: Path) -> None:
    compiled = splitpoint.compile(block(), Config(max_size=64, cache_dir=str(tmp_path)))
    x = torch.randn(3, 8)
    want = compiled(x)
    again = pickle.loads(pickle.dumps(compiled))
    assert_close(again(x), want)
    assert again.stats().compilations == 0
    assert again.stats().loads > 0


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


def test_compiled_functions_and_methods_are_copied_and_pickled_too() -> None:
    module = block()
    x = torch.randn(3, 8)
    for function in (halved, module.forward):
        compiled = splitpoint.compile(function, PLAIN)
        assert not isinstance(compiled, nn.Module)
        for again in (pickle.loads(pickle.dumps(compiled)), copy.deepcopy(compiled)):
            assert_close(again(x), function(x))


def test_a_module_whose_weights_were_freed_is_not_pickled() -> None:
    module = nn.Sequential(nn.Linear(256, 256)).eval().requires_grad_(False)
    config = Config(max_size=8, cache_dir="", free_original_weights=True, linear={"1-8": "packed"})
    compiled = splitpoint.compile(module, config)
    compiled(torch.randn(2, 256))
    if compiled.stats().freed_bytes == 0:
        pytest.skip("nothing is packed here")
    with pytest.raises(errors.WeightsFreed):
        pickle.dumps(compiled)


def test_forward_is_compiled_and_has_the_signature_of_the_module() -> None:
    module = block()
    compiled = splitpoint.compile(module, PLAIN)
    assert list(inspect.signature(compiled.forward).parameters) == ["x", "scale"]
    compiled.forward(torch.randn(3, 8))
    assert sum(compiled.stats().dispatches.values()) == 1


def test_parameters_of_a_call_are_followed() -> None:
    module = block()
    compiled = splitpoint.compile(module, PLAIN)
    x, shift = torch.randn(3, 8), {"shift": torch.zeros(4)}
    compiled(x)
    assert_close(functional_call(compiled, shift, (x,)), functional_call(module, shift, (x,)))


def test_torch_compile_around_it_leaves_it_as_it_is() -> None:
    compiled = splitpoint.compile(block(), PLAIN)
    parent = nn.Sequential(compiled, nn.ReLU())
    x = torch.randn(3, 8)
    want = parent(x)
    assert_close(torch.compile(parent, backend="eager")(x), want)


def test_a_model_with_a_compiled_part_is_refused() -> None:
    parent = nn.Sequential(splitpoint.compile(block(), PLAIN), nn.ReLU())
    with pytest.raises(errors.ConfigError, match="0, a part of this model, is compiled already"):
        splitpoint.compile(parent, PLAIN)
