"""Original weights that are freed: the same results in less memory, and an error, never a number,
from whatever needs one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitpoint
from splitpoint import Config, compile
from splitpoint.errors import ConfigError, InvalidField, StateChanged, WeightsFreed, WeightsInUse
from splitpoint.runtime.freed_weights import FreedParameter, is_freed

PACKAGE = str(Path(splitpoint.__file__).parents[1])
WIDTH = 192
SIZES = (1, 5, 40)
PLAN: dict[str, Any] = {
    "max_size": 64,
    "split_points": [8],
    "cache_dir": "",
    "linear": {"1-64": "packed"},  # what is measured differs from run to run
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """An embedding that is the output layer too, and blocks between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 300, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @property
    def linears(self) -> list[nn.Linear]:
        return [linear for block in self.blocks for linear in (block.up, block.down)]


def make(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model().eval().requires_grad_(False)


def compiled(module: Any, **settings: Any) -> Any:
    """Compiled and called once."""
    made = compile(module, Config(**PLAN | {"free_original_weights": True} | settings))
    made(ids(SIZES[0]))
    return made


def ids(size: int) -> torch.Tensor:
    return torch.arange(size) * 7 % 300


BYTES = 4 * 2 * WIDTH * WIDTH * 4
"""Of the weights of the linear layers that are not the embedding too."""


def assert_close(made: Any, reference: Any) -> None:
    for size in SIZES:
        torch.testing.assert_close(made(ids(size)), reference(ids(size)), rtol=1e-4, atol=1e-3)


def differ(made: Any, kept: Any) -> bool:
    return any(not torch.equal(made(ids(size)), kept(ids(size))) for size in SIZES)


MODES = [
    {},
    {"module_guards": "first_call"},
    {"runner": "python"},
]


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_results_are_those_without_it_and_tied_weights_stay(settings: dict[str, Any]) -> None:
    module, reference = make(), make()
    made = compiled(module, **settings)
    kept = compiled(reference, free_original_weights=False)
    assert not differ(made, kept)
    assert all(is_freed(linear.weight) for linear in module.linears)
    assert not is_freed(module.head.weight)
    assert torch.equal(module.embedding.weight, reference.embedding.weight)
    assert (made.stats().freed_bytes, kept.stats().freed_bytes) == (BYTES, 0)
    assert f"{BYTES / 2**20:.1f} MiB of original weights freed" in str(made.stats())
    assert all(linear.weight.untyped_storage().nbytes() for linear in reference.linears)


READS: dict[str, Callable[[Any, Any], object]] = {
    "the module itself": lambda module, made: module(ids(3)),
    "size 0": lambda module, made: made(ids(0)),
    "a size out of plan": lambda module, made: made(ids(65)),
    "another model": lambda module, made: compiled(module, free_original_weights=False),
    "another model with it": lambda module, made: compiled(module),
    "state_dict": lambda module, made: made.state_dict(),
    "deepcopy": lambda module, made: copy.deepcopy(module),
    "another dtype": lambda module, made: module.linears[0].to(torch.float64),
    "values": lambda module, made: module.linears[0].weight.tolist(),
    "data": lambda module, made: module.linears[0].weight.data,
    "a transpose": lambda module, made: module.linears[0].weight.T,
    "a view": lambda module, made: module.linears[0].weight[0],
    "numpy": lambda module, made: module.linears[0].weight.numpy(),
    "an update in place": lambda module, made: module.linears[0].weight.add_(1),
    "an element": lambda module, made: module.linears[0].weight.__setitem__(0, 1.0),
    "a copy of it": lambda module, made: torch.empty(2 * WIDTH, WIDTH).copy_(
        module.linears[0].weight
    ),
    "another freed one": lambda module, made: module.linears[0].weight.copy_(
        module.linears[2].weight
    ),
}


def test_what_needs_a_freed_weight_raises() -> None:
    module = make()
    made = compiled(module, on_out_of_plan="eager")
    before = made(ids(3))
    for name, read in READS.items():
        with pytest.raises(WeightsFreed, match="free_original_weights"):
            pytest.fail(f"{name} gives {read(module, made)}")
        assert torch.equal(made(ids(3)), before)
    by_dynamo = torch.compile(module, backend="eager")
    with pytest.raises(Exception, match="whose memory was freed"):
        by_dynamo(ids(3))
    made.reset()
    with pytest.raises(WeightsFreed, match=r"blocks\.0\.up\.weight .* cannot be captured again"):
        made(ids(3))
    module.load_state_dict(make().state_dict())
    assert torch.equal(made(ids(3)), before)
    assert made.stats().freed_bytes == BYTES


def _loaded(module: Any, other: Any) -> None:
    module.load_state_dict(other.state_dict())


def _assigned(module: Any, other: Any) -> None:
    module.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    module.head.weight = module.embedding.weight
    module.requires_grad_(False)


def _data(module: Any, other: Any) -> None:
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        ours.data = theirs.detach().clone()


def _copied(module: Any, other: Any) -> None:
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert ours.copy_(theirs) is ours


def _set(module: Any, other: Any) -> None:
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert ours.set_(theirs.detach().clone()) is ours


UPDATES = {
    "loaded": _loaded,
    "assigned": _assigned,
    "data": _data,
    "copied": _copied,
    "set": _set,
}


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_new_values_are_packed_and_freed_again(settings: dict[str, Any]) -> None:
    updates = dict(UPDATES)
    if settings.get("module_guards") == "first_call":
        del updates["assigned"]  # replaced parameters are not followed then
    module = make()
    made = compiled(module, **settings)
    for seed, (name, update) in enumerate([*updates.items()] * 2, 1):
        other = make(seed)
        update(module, other)
        assert torch.equal(module(ids(3)), other(ids(3)))  # whole until it is packed
        assert not any(is_freed(linear.weight) for linear in module.linears)
        if name != "assigned":  # those replaced are known to be gone at the next call
            assert made.stats().freed_bytes == 0
        assert_close(made, other)
        assert made.stats().freed_bytes == BYTES
        assert all(is_freed(linear.weight) for linear in module.linears)


def test_threads_that_find_the_module_changed_at_once_get_right_results() -> None:
    module = make()
    made = compiled(module)
    want = made(ids(5))
    wrong: list[object] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            try:
                if not torch.equal(made(ids(5)), want):
                    wrong.append("other values")
            except Exception as error:  # noqa: BLE001  the main thread shows it
                wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for note in range(300):
            module.blocks[0].note = note  # each thread looks at all that was captured then
            made(ids(5))
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    assert made.stats().freed_bytes == BYTES


def test_one_weight_of_many_may_be_given_values() -> None:
    module, reference = make(), make()
    made = compiled(module)
    new = torch.randn(2 * WIDTH, WIDTH)
    module.linears[0].weight.data = new
    reference.linears[0].weight.data = new.clone()
    assert made.stats().freed_bytes == BYTES * 3 // 4
    assert_close(made, reference)
    assert made.stats().freed_bytes == BYTES


def test_values_of_another_kind_are_refused() -> None:
    module = make()
    made = compiled(module)
    module.linears[0].weight.data = torch.zeros(3, 4)
    with pytest.raises(StateChanged):
        made(ids(3))


def test_other_changes_of_the_module_are_still_seen() -> None:
    module = make()
    made = compiled(module)
    module.blocks[0].norm.eps = 0.5
    with pytest.raises(StateChanged, match="eps"):
        made(ids(3))
    module.blocks[0].norm.eps = 1e-5
    made(ids(3))
    module.blocks[0].norm.weight.mul_(2)
    reference = make()
    reference.blocks[0].norm.weight.mul_(2)
    assert_close(made, reference)


def test_another_model_that_reads_the_weights_says_so() -> None:
    module = make()
    kept = compiled(module, free_original_weights=False, linear="inductor")
    compiled(module)
    with pytest.raises(WeightsFreed, match="another compiled model"):
        kept(ids(3))


def test_a_model_that_would_not_notice_keeps_its_weights() -> None:
    """Without its guards it would read past the end of what is left of them."""
    module = make()
    blind = compiled(
        module, free_original_weights=False, linear="inductor", module_guards="first_call"
    )
    want = blind(ids(5))
    made = compile(module, Config(**PLAN, free_original_weights=True))
    for _ in range(2):
        with pytest.raises(WeightsInUse, match="every_call' or call its reset"):
            made(ids(5))
        assert not any(is_freed(linear.weight) for linear in module.linears)
        assert torch.equal(blind(ids(5)), want)
    blind.reset()
    torch.testing.assert_close(made(ids(5)), want, rtol=1e-4, atol=1e-3)
    assert made.stats().freed_bytes == BYTES
    with pytest.raises(WeightsFreed, match="cannot be captured again"):
        blind(ids(5))
    # Nor does it come to read them while they are whole, once the other frees them again.
    module.load_state_dict(make(1).state_dict())
    want = blind(ids(5))
    with pytest.raises(WeightsInUse):
        made(ids(5))
    assert torch.equal(blind(ids(5)), want)
    del blind
    torch.testing.assert_close(made(ids(5)), want, rtol=1e-4, atol=1e-3)
    assert made.stats().freed_bytes == BYTES


CONVERSIONS: dict[str, Callable[[Any], object]] = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "a part": lambda module: module.blocks[0].to(torch.float64),
}


def test_a_conversion_changes_all_or_nothing(tmp_path: Path) -> None:
    module = make()
    made = compiled(module)
    want = made(ids(5))
    for convert in CONVERSIONS.values():
        with pytest.raises(WeightsFreed, match="nothing was changed"):
            convert(module)
        assert {each.dtype for each in module.parameters()} == {torch.float32}
        assert torch.equal(made(ids(5)), want)
    module.blocks[0].norm.to(torch.float32)  # has all its weights
    module.load_state_dict(make().state_dict())
    torch.save(module, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    for whole in (module, copy.deepcopy(module), again):
        torch.testing.assert_close(whole(ids(5)), want, rtol=1e-4, atol=1e-3)
    for whole in (copy.deepcopy(module), again):
        whole.to(torch.float64)
        assert {each.dtype for each in whole.parameters()} == {torch.float64}
        assert {each.dtype for each in module.parameters()} == {torch.float32}
    assert module.to(torch.float64) is module
    with pytest.raises(StateChanged):
        made(ids(5))


KEPT: dict[str, dict[str, Any]] = {
    "a range of Inductor's": {"linear": {"1-8": "packed", "9-64": "inductor"}},
    "a range that reads it plain": {"linear": {"1-8": "gemv", "9-64": "packed"}},
    "no room for copies": {"max_packed_bytes": 0},
    "eager": {"backend": "eager"},
}


@pytest.mark.parametrize("name", KEPT)
def test_a_weight_that_some_range_reads_stays(name: str) -> None:
    module = make()
    made = compiled(module, **KEPT[name])
    assert made.stats().freed_bytes == 0
    assert_close(made, module)


def test_memory_shared_with_what_stays_stays() -> None:
    module = make()
    both = torch.cat([module.linears[0].weight, module.linears[2].weight])
    module.linears[0].weight.data, module.linears[2].weight.data = both.chunk(2)
    module.register_buffer("first", module.linears[1].weight.data[0])
    compiled(module)
    assert [is_freed(each.weight) for each in module.linears] == [True, False, True, True]


def test_measured_kernels_read_copies() -> None:
    module = make()
    made = compiled(module, linear="auto", linear_budget_s=60.0)
    assert made.stats().freed_bytes == BYTES
    chosen = {name for entry in made.plan.entries for name in dict(entry.linear).values()}
    assert chosen <= {"packed", "onednn"}


def test_buffers_and_int8_weights_are_freed() -> None:
    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-9, 9, (WIDTH, 256), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale

    module = Int8()
    x = torch.randn(4, 256)
    want = module(x)
    made = compile(module, Config(**PLAN, free_original_weights=True))
    torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-3)
    assert made.stats().freed_bytes == WIDTH * 256
    with pytest.raises(WeightsFreed):
        module(x)
    module.weight.copy_(torch.ones(WIDTH, 256))
    torch.testing.assert_close(made(x), x.sum(1, keepdim=True) * module.scale)
    assert made.stats().freed_bytes == WIDTH * 256


def test_a_freed_weight_says_what_it_is() -> None:
    module = make()
    compiled(module)
    weight = module.linears[0].weight
    assert isinstance(weight, nn.Parameter)
    assert type(weight) is FreedParameter
    assert (tuple(weight.shape), weight.dtype) == ((2 * WIDTH, WIDTH), torch.float32)
    assert repr(weight) == f"<freed weight [{2 * WIDTH}, {WIDTH}] of torch.float32>"
    assert sum(p.numel() for p in module.parameters()) == sum(
        p.numel() for p in make().parameters()
    )


@pytest.mark.parametrize("name", ["lazy", "background"])
def test_what_compiles_later_is_refused(name: str) -> None:
    with pytest.raises(InvalidField, match=f"cannot go with {name}=True"):
        Config(free_original_weights=True, **{name: True})


def test_it_is_not_for_torch_compile() -> None:
    by_dynamo = torch.compile(
        make(), backend="splitpoint", options={**PLAN, "free_original_weights": True}
    )
    with pytest.raises(Exception, match=r"not for torch\.compile") as raised:
        by_dynamo(ids(3))
    causes = [raised.value, raised.value.__cause__, getattr(raised.value, "inner_exception", None)]
    assert any(isinstance(cause, ConfigError) for cause in causes)


RUN = """
import json, os, sys
import torch
torch.set_num_threads(1)
from splitpoint import Config, compile

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.manual_seed(0)
layers = [torch.nn.Linear(2048, 2048) for _ in range(12)]
module = torch.nn.Sequential(*layers).eval().requires_grad_(False)
x = torch.randn(3, 2048)
want = module(x)
config = dict(max_size=8, linear={"1-8": "packed"}, cache_dir=sys.argv[1])
made = compile(module, Config(**config, free_original_weights=sys.argv[2] == "True"))
got = made(x)
stats = made.stats()
print(json.dumps(dict(resident=resident(), wrong=(got - want).abs().max().item(),
    freed=stats.freed_bytes, loads=stats.loads, compilations=stats.compilations,
    result=got.sum().item())))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_is_given_back_and_a_start_from_the_store_does_the_same(tmp_path: Path) -> None:
    def start(free: bool) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path / "store"), str(free)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"},
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert answer["wrong"] < 1e-4
        return answer

    weights = 12 * 2048 * 2048 * 4
    cold, warm = start(True), start(True)
    assert cold["compilations"] > 0
    assert (warm["compilations"], warm["loads"]) == (0, cold["compilations"])
    kept, kept_warm = start(False), start(False)
    assert kept["compilations"] + kept["loads"] > 0
    assert kept_warm["compilations"] == 0
    assert [each["freed"] for each in (cold, warm, kept, kept_warm)] == [weights, weights, 0, 0]
    assert len({each["result"] for each in (cold, warm, kept, kept_warm)}) == 1
    for free, whole in ((cold, kept), (warm, kept_warm)):
        assert whole["resident"] - free["resident"] > 0.8 * weights
