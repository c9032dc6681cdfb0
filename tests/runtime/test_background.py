"""Ranges compiled in a thread while calls are served, by real threads and real compiles."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import splitpoint
from splitpoint import Config, Range, errors
from splitpoint.passes.base import Pass
from splitpoint.runtime.background import Background

PACKAGE = str(Path(splitpoint.__file__).parents[1])


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x)) + x


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval().requires_grad_(False)


class Hold(Pass):
    """Holds the compiler in one range until it is let go, or fails there."""

    def __init__(self, range_: Range, fail: bool = False) -> None:
        self.range = range_
        self.fail = fail
        self.reached, self.let_go = threading.Event(), threading.Event()
        self.own = uuid.uuid4().hex  # Inductor keeps what a pass made, by the pass's uuid

    def applies_to(self, range_: Range) -> bool:
        return range_ == self.range

    def uuid(self) -> str:
        return self.own

    def __call__(self, graph: torch.fx.Graph) -> int:
        self.reached.set()
        assert self.let_go.wait(60)
        if self.fail:
            raise ValueError("it cannot be done")
        return 0


def config(**options: object) -> Config:
    given = {"max_size": 64, "split_points": [8], "linear": "inductor", "cache_dir": ""}
    return Config(**{**given, "background": True, **options})


def same(compiled: Callable[..., torch.Tensor], module: Block, size: int) -> None:
    x = torch.randn(size, 16)
    torch.testing.assert_close(compiled(x), module(x))


def served(compiled: splitpoint.CompiledModel) -> tuple[int, int]:
    """Calls so far, and those that the model itself served."""
    stats = compiled.stats()
    return sum(stats.dispatches.values()), stats.eager_calls


def test_the_model_serves_until_the_range_is_compiled():
    module, hold = block(), Hold(Range(1, 8))
    compiled = splitpoint.compile(module, config(passes=[hold]))
    for size in (5, 9, 8):
        same(compiled, module, size)
    assert hold.reached.wait(60)
    same(compiled, module, 3)
    assert served(compiled)[1] >= 3
    hold.let_go.set()
    assert compiled.wait(60)
    before = served(compiled)
    for size in (1, 8, 9, 64):
        same(compiled, module, size)
    assert served(compiled) == (before[0] + 4, before[1])
    assert compiled.stats().compilations == 2


def test_a_range_around_a_size_serves_it():
    module, hold = block(), Hold(Range(5, 5))
    compiled = splitpoint.compile(module, config(compile_sizes=[5], passes=[hold], lazy=True))
    same(compiled, module, 4)
    assert compiled.wait(60)
    same(compiled, module, 4)
    eager = served(compiled)[1]
    same(compiled, module, 5)
    assert hold.reached.wait(60)
    same(compiled, module, 5)
    assert served(compiled)[1] == eager  # by the graph of [1,8]
    hold.let_go.set()
    assert compiled.wait(60)
    same(compiled, module, 5)
    assert compiled.stats().compilations == 2


def test_what_is_not_valid_for_all_sizes_does_not_cover():
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] != 5 else x - 1

    hold = Hold(Range(5, 5))
    compiled = splitpoint.compile(f, config(compile_sizes=[5], passes=[hold]))
    hold.let_go.set()
    for size in (4, 5, 6, 64):
        torch.testing.assert_close(compiled(torch.ones(size, 4)), f(torch.ones(size, 4)))
    assert compiled.wait(60)
    for size in (4, 5, 6, 64):
        torch.testing.assert_close(compiled(torch.ones(size, 4)), f(torch.ones(size, 4)))


def test_only_ranges_that_are_called_with_lazy():
    module = block()
    compiled = splitpoint.compile(module, config(lazy=True))
    same(compiled, module, 5)
    assert compiled.wait(60)
    assert compiled.stats().compilations == 1


def test_a_model_that_branches_on_the_size():
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] <= 20 else x.sum(0) - x

    compiled = splitpoint.compile(f, config())
    for _ in range(2):
        for size in (5, 9, 20, 21, 64):
            x = torch.randn(size, 4)
            torch.testing.assert_close(compiled(x), f(x), rtol=1e-4, atol=1e-4)
        assert compiled.wait(60)
    assert len(compiled.plan.ranges) == 3


def test_a_failure_is_reported_and_the_model_serves(caplog):
    module, hold = block(), Hold(Range(9, 64), fail=True)
    hold.let_go.set()
    compiled = splitpoint.compile(module, config(passes=[hold]))
    same(compiled, module, 5)
    for _ in range(2):
        with pytest.raises(errors.BackgroundError, match=r"\[9,64\].*it cannot be done") as caught:
            compiled.wait(60)
        assert isinstance(caught.value.__cause__, errors.PassError)
    assert "it cannot be done" in caplog.text
    for size in (5, 9, 64):
        same(compiled, module, size)
    assert list(compiled.stats().failed) == [Range(9, 64)]
    assert "[9,64] is not compiled" in str(compiled.stats())
    assert compiled.stats().compilations == 1


@pytest.mark.parametrize("linear", ["inductor", "packed"])
def test_what_the_module_holds_when_a_range_is_swapped_in_is_used(linear):
    module, hold = block(), Hold(Range(9, 64))
    compiled = splitpoint.compile(module, config(passes=[hold], linear={"1-64": linear}))
    same(compiled, module, 5)
    assert hold.reached.wait(60)
    module.linear.weight = torch.nn.Parameter(torch.randn(16, 16), requires_grad=False)
    module.linear.bias.add_(1.0)
    same(compiled, module, 5)
    hold.let_go.set()
    assert compiled.wait(60)
    module.linear.weight.mul_(2.0)
    module.linear.bias = torch.nn.Parameter(torch.randn(16), requires_grad=False)
    for size in (5, 20):
        same(compiled, module, size)


def test_threads_that_call_while_ranges_are_swapped_in():
    module = block()
    compiled = splitpoint.compile(module, config(max_size=256, split_points=[2, 8, 32, 64]))
    compiled(torch.randn(3, 16))
    stop = threading.Event()
    wrong: list[object] = []
    calls = [0] * 4

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        while not stop.is_set() or calls[number] < 20:
            x = torch.randn(int(torch.randint(1, 257, (1,), generator=generator)), 16)
            try:
                torch.testing.assert_close(compiled(x), module(x))
            except Exception as error:  # noqa: BLE001  compared below
                wrong.append(error)
            calls[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert compiled.wait(120)
        time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert compiled.stats().compilations == 5


def test_close_stops_after_the_piece_at_hand():
    module, hold = block(), Hold(Range(1, 8))
    compiled = splitpoint.compile(module, config(passes=[hold]))
    same(compiled, module, 5)
    assert hold.reached.wait(60)
    threading.Timer(0.1, hold.let_go.set).start()
    compiled.close()
    assert not [t for t in threading.enumerate() if t.name == "splitpoint-compile"]
    for size in (5, 20):
        same(compiled, module, size)
    assert compiled.stats().compilations == 1
    assert compiled.wait(1)


def test_functions_of_torch_compile_can_be_called_meanwhile():
    module = block()
    compiled = splitpoint.compile(module, config())
    traced = torch.compile(lambda x: x * 3 - 1, backend="eager")
    x = torch.randn(5, 16)
    traced(x)
    same(compiled, module, 3)
    # What has to be compiled waits for the lock.
    other = torch.compile(lambda x: x / 3, backend="eager")
    assert torch.equal(other(x), x / 3)
    calls = 0
    while not compiled.wait(0):
        assert torch.equal(traced(x), x * 3 - 1)
        calls += 1
    assert calls > 100


def test_a_backend_of_torch_compile_refuses_it():
    compiled = torch.compile(block(), backend="splitpoint", options={"background": True})
    with pytest.raises(Exception, match=r"background.*splitpoint.compile"):
        compiled(torch.randn(5, 16))


RUN = """
import sys, torch, splitpoint
from splitpoint import Config, compile
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()).eval().requires_grad_(False)
config = dict(max_size=64, split_points=[8], linear="inductor", cache_dir=sys.argv[1])
compiled = compile(module, Config(**config, **{options}))
for size in {sizes}:
    x = torch.randn(size, 16)
    torch.testing.assert_close(compiled(x), module(x))
{end}
"""


def run(folder: Path, options: str, sizes: str = "(5, 20)", end: str = "") -> str:
    code = textwrap.dedent(RUN).replace("{options}", options).replace("{sizes}", sizes)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{end}", end), str(folder)],
        env={**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


COUNTS = "s = compiled.stats(); print(s.compilations, s.loads, 'torch._inductor' in sys.modules)"


@pytest.mark.parametrize("options", ["dict(lazy=True)", "dict(background=True)"])
def test_what_was_compiled_late_is_kept_as_a_whole(options, tmp_path):
    run(tmp_path / "kept", options, end="compiled.wait()" if "background" in options else "")
    assert run(tmp_path / "kept", "{}", end=COUNTS).split() == ["0", "2", "False"]
    assert run(tmp_path / "kept", options, end=COUNTS).split() == ["0", "2", "False"]


def test_a_program_that_ends_while_compiling_ends_soon(tmp_path):
    start = time.monotonic()
    run(tmp_path / "kept", "dict(background=True)", "(5,)")
    assert time.monotonic() - start < 100  # a hang, not a time
    assert run(tmp_path / "kept", "{}", end=COUNTS).split()[0] in ("0", "1", "2")


# --- the thread itself ------------------------------------------------------------------


def test_what_is_wanted_soon_comes_first():
    order: list[int] = []
    began, go = threading.Event(), threading.Event()

    def compile(index: int) -> None:
        began.set()
        assert go.wait(10)
        order.append(index)

    background = Background(compile)
    background.want(1)
    assert began.wait(10)
    for index in (2, 3, 2):
        background.want(index)
    background.want(3, soon=True)
    go.set()
    assert background.wait(10)
    assert order == [1, 3, 2]
    background.want(4)
    assert background.wait(10)
    assert order[-1] == 4


def test_the_switch_interval_is_put_back_by_the_last_of_several():
    before = sys.getswitchinterval()
    go = [threading.Event(), threading.Event()]
    several = []
    for each in go:
        started = threading.Event()

        def compile(index: int, started=started, each=each) -> None:
            started.set()
            assert each.wait(10)

        several.append(Background(compile))
        several[-1].want(1)
        assert started.wait(10)
    go[0].set()
    assert several[0].wait(10)
    assert sys.getswitchinterval() < before
    go[1].set()
    assert several[1].wait(10)
    assert sys.getswitchinterval() == before


def test_the_switch_interval_is_put_back():
    before = sys.getswitchinterval()
    inside: list[float] = []
    background = Background(lambda index: inside.append(sys.getswitchinterval()))
    background.want(1)
    assert background.wait(10)
    assert inside[0] < before == sys.getswitchinterval()
