"""Kernels in C++ built together, and the pieces that wait for theirs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from splitpoint.compilers.batch import Batch, Waiting
from splitpoint.compilers.inductor import Compiled
from splitpoint.errors import CompileError
from splitpoint.store.store import Store
from splitpoint.torch_internals import cpp_kernels as cpp
from splitpoint.torch_internals.cpp_kernels import Kernel, build

PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>\n"


def kernel_of(body: str, before: str = "") -> Kernel:
    """A kernel as Inductor writes it, over a tensor `p` of `n` floats."""
    source = (
        f'\n{PREFIX}{before}extern "C" void kernel(float* p, const int64_t n)\n{{\n{body}\n}}\n'
    )
    return Kernel(("float*", "const int64_t"), source)


def each(code: str) -> str:
    return f"for (int64_t i = 0; i < n; ++i) {{ {code}; }}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def result(kernel: Kernel) -> list[float]:
    values = torch.arange(4.0)
    kernel(values, 4)
    return values.tolist()


def test_kernels_with_the_same_names_in_them_are_one_library() -> None:
    """Those that ask the preprocessor for something are libraries of their own."""
    factor = "static float factor(float x) {{ return {} * x; }}\n"
    twice = kernel_of(each("p[i] = factor(p[i])"), factor.format(2))
    again = kernel_of(each("p[i] = factor(p[i])"), factor.format(2))
    thrice = kernel_of(each("p[i] = factor(p[i])"), factor.format(3))
    macro = kernel_of(each("p[i] = FOUR * p[i]"), "#define FOUR 4\n")
    assert result(macro)[3] == 12  # built when it is called
    vector = kernel_of("auto x = at::vec::Vectorized<float>::loadu(p, n); (x + x + x).store(p, n);")
    throws = kernel_of('throw std::runtime_error("kernel: " + std::to_string(n));')
    built = [twice, again, thrice, vector, macro, throws]
    assert [kernel.can_join for kernel in built] == [True, True, True, True, False, True]
    names: dict[str, object] = {}
    twice.put(names, "before")
    build(built, workers=2)
    twice.put(names, "after")
    assert names["before"] is names["after"] is twice.function is again.function
    assert [result(kernel)[3] for kernel in built[:5]] == [6, 6, 9, 9, 12]
    with pytest.raises(RuntimeError, match="kernel: 4"):
        result(throws)
    places = [cpp.kernel_place(kernel) for kernel in built]
    assert [len({path for path, _ in places}), places[0][0]] == [3, places[1][0]]
    assert len({symbol for _, symbol in places}) == 5
    assert places[4][1] == "kernel"


def test_the_piece_whose_kernel_is_refused_is_named_and_others_are_built() -> None:
    good, bad = kernel_of(each("p[i] = 5")), kernel_of("no C++")
    batch = Batch(None)
    for name, kernel in (("bad", bad), ("good", good)):
        compiled = Compiled(kernel, (), (), waiting=(kernel,))
        batch.add(Waiting(f"piece {name}", compiled))
    with pytest.raises(CompileError, match="the C\\+\\+ compiler failed on piece bad"):
        batch.finish()
    assert good.function is not None
    assert result(good) == [5] * 4


def test_two_that_lock_in_opposite_orders_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Neither holds a lock while it waits for one."""
    both = threading.Barrier(2)
    held: list[bool] = []

    def run(keys: list[str]) -> None:
        batch = Batch(Store(tmp_path / "store", lock_timeout_s=30))
        held.append(batch.lock(keys[0]))
        both.wait()
        held.append(batch.lock(keys[1]))
        batch.close()

    threads = [threading.Thread(target=run, args=(keys,)) for keys in (["a", "b"], ["b", "a"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert held == [True] * 4


def test_a_lock_is_held_until_the_batch_ends(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    batch = Batch(store)
    assert batch.lock("a")
    assert batch.lock("a")
    with store.lock("a", wait=False) as other:
        assert not other
    batch.finish()
    with store.lock("a", wait=False) as other:
        assert other
