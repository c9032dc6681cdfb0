"""Kernels of vLLM's layers are chosen by times, kept times, memory and cores."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from splitpoint import kernels
from splitpoint.integrations.vllm import memory, store
from splitpoint.integrations.vllm.choice import OURS, THEIRS, Choice, choose
from splitpoint.integrations.vllm.chosen import chosen, note
from splitpoint.integrations.vllm.shapes import Shape
from splitpoint.tuning.measure import Budget


@pytest.mark.parametrize(
    ("measured", "both", "chosen"),
    [
        ({}, True, THEIRS),
        ({1: (1, 2), 8: (1, 2), 512: (1, 2)}, True, OURS),
        ({1: (2, 1), 8: (2, 1), 512: (2, 1)}, True, THEIRS),
        ({1: (1, 2), 8: (1, 2), 512: (1.04, 1)}, True, OURS),  # as fast, within noise
        ({1: (1, 2), 8: (1, 2), 32: (2, 1), 512: (2, 1)}, True, Choice(16)),
        ({1: (1, 2), 8: (1.5, 1), 32: (1, 2), 512: (2, 1)}, True, Choice(128)),
        ({1: (1, 2), 8: (1, 2), 512: (3, 1)}, False, OURS),
        ({1: (1, 2), 8: (3, 1), 512: (3, 1)}, False, THEIRS),
        ({1: (math.inf, 1)}, True, THEIRS),
        ({1: (1, 2), 8: (math.inf, 1)}, False, THEIRS),
        ({1: (1, 2), 8: (math.inf, 1)}, True, Choice(2)),
    ],
)
def test_the_choice_loses_least(
    measured: dict[int, tuple[float, float]], both: bool, chosen: Choice
) -> None:
    assert choose(measured, both) == chosen


def test_weights_lie_twice_as_far_as_memory_goes() -> None:
    pytest.importorskip("torch")
    from splitpoint.integrations.vllm.loading import choices

    times = {1: (1.0, 2.0), 8: (1.0, 2.0), 32: (2.0, 1.0)}
    small, large = Shape(64, 64, torch.float32), Shape(512, 64, torch.float32)
    head = Shape(64, 64, torch.float32, stays=True)
    measured = dict.fromkeys((small, large, head), times)
    counts = {large: 2, small: 2, head: 1}
    chosen = choices(measured, counts, spare=2 * small.nbytes)
    assert chosen == {small: Choice(16), large: OURS, head: OURS}
    chosen = choices(measured, counts, spare=2 * (small.nbytes + large.nbytes))
    assert chosen == {small: Choice(16), large: Choice(16), head: OURS}


# --- what was measured -----------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Kept:
    kernels.load()
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path)
    return store.Kept()


def test_times_are_found_again(kept: store.Kept) -> None:
    shape, other = Shape(64, 32, torch.bfloat16), Shape(64, 32, torch.float32)
    assert kept.read() == {}
    kept.add({shape: {1: (1.23456789e-5, 2e-5)}})
    kept.add({other: {8: (math.inf, 2e-5)}})
    found = store.Kept().read()
    assert found == {str(shape): {1: (1.235e-5, 2e-5)}, str(other): {8: (math.inf, 2e-5)}}
    assert [path.name for path in kept.path.parent.iterdir()] == [kept.path.name]


def test_processes_that_measure_side_by_side_take_the_times_of_the_first(
    kept: store.Kept,
) -> None:
    shape, other = Shape(64, 32, torch.bfloat16), Shape(96, 32, torch.bfloat16)
    assert kept.add({shape: {1: (1.00006, 2.0)}}) == {shape: {1: (1.0, 2.0)}}
    found = store.Kept().add({shape: {1: (2.0, 1.0)}, other: {1: (3.0, 1.0)}})
    assert found == {shape: {1: (1.0, 2.0)}, other: {1: (3.0, 1.0)}}
    assert store.Kept().add({shape: {1: (2.0, 1.0)}}) == {shape: {1: (1.0, 2.0)}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"conditions": 1}', "\x00", '{"seconds": 3}'])
def test_a_damaged_file_is_written_anew(kept: store.Kept, text: str) -> None:
    kept.path.parent.mkdir()
    kept.path.write_text(text)
    assert kept.read() == {}
    kept.add({Shape(64, 32, torch.float32): {1: (1.0, 2.0)}})
    assert len(kept.read()) == 1


@pytest.mark.parametrize("seconds", [{"a": 1}, {"a": {"1": 3}}, {"a": {"x": [1, 2]}}])
def test_times_that_are_none_are_measured_anew(kept: store.Kept, seconds: object) -> None:
    kept.path.parent.mkdir()
    kept.path.write_text(json.dumps({"conditions": kept.conditions, "seconds": seconds}))
    assert kept.read() == {}


def test_other_threads_have_other_times(kept: store.Kept) -> None:
    torch.set_num_threads(2)
    assert store.Kept().path != kept.path


# --- what vLLM's own stores are told ---------------------------------------------------


def test_other_kernels_are_other_keys() -> None:
    def noted(*models: list[str]) -> list[str] | None:
        config = SimpleNamespace(additional_config={"other": 1})
        for kernels_ in models:
            note(config, kernels_)
        assert config.additional_config["other"] == 1
        return chosen(config)

    assert noted() == []
    first = noted(["64x32 fp32 None", "64x64 fp32 16"])
    assert first == noted(["64x32 fp32 None", "64x64 fp32 16"])
    others = [["64x64 fp32 16", "64x32 fp32 None"], ["64x32 fp32 None", "64x64 fp32 8"], []]
    assert all(noted(other) != first for other in others)
    assert noted(["a"], ["b"]) != noted(["b"], ["a"])


def test_a_configuration_of_another_kind_is_told_nothing() -> None:
    config = SimpleNamespace(additional_config=object())
    note(config, ["a"])
    note(None, ["a"])
    assert chosen(config) is None


# --- measuring -------------------------------------------------------------------------


def torch_own(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_are_measured_with_few_rows_first(dtype: torch.dtype) -> None:
    kernels.load()
    from splitpoint.integrations.vllm.measuring import ROWS, measure

    shape = Shape(100, 40, dtype)  # neither a multiple of a block
    weights = {shape: [torch.randn(100, 40, dtype=dtype)]}
    found = measure(weights, torch_own, Budget(20.0))[shape]
    assert tuple(found) == ROWS
    assert all(0 < seconds < 1 for pair in found.values() for seconds in pair)
    assert measure(weights, torch_own, Budget(1e-9)) == {shape: {}}


def test_a_kernel_that_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.load()
    from splitpoint.integrations.vllm import kernel, measuring

    class Wrong(kernel.Packed):
        def __call__(self, x, weight, bias):  # type: ignore[no-untyped-def]
            return super().__call__(x, weight, bias).mul_(1.01)

    monkeypatch.setattr(kernel, "Packed", Wrong)
    shape = Shape(64, 32, torch.float32)
    found = measuring.measure({shape: [torch.randn(64, 32)]}, torch_own, Budget(20.0))[shape]
    assert found[1][0] == math.inf
    assert choose(found, True) == THEIRS


# --- memory and cores ------------------------------------------------------------------


def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:     50 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_bytes() == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.available_bytes() == 50 * 1024
    (tmp_path / "memory.max").write_text("4000\n")
    assert memory.available_bytes() == 3000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no cores to bind to here")
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_want_a_core_each(threads: int) -> None:
    code = f"""if True:
    import os
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    import torch
    torch.set_num_threads({threads})
    from splitpoint.errors import SharedCores
    from splitpoint.integrations.vllm.threads import check_threads
    try:
        check_threads()
        print("a core each")
    except SharedCores as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("2 threads share 1 core" in done.stdout) == (threads == 2), done
