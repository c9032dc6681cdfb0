"""vLLM's own engine on a small random model in float32: the same tokens, whatever runs a layer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from .starting import NEEDS_VLLM, Answer, start

OURS = "splitpoint.integrations.vllm.kernel"

pytestmark = NEEDS_VLLM


def only_file(cache: Path) -> Path:
    (path,) = (cache / "vllm").iterdir()
    return path


def decide(path: Path, times: dict[str, tuple[float, float]]) -> None:
    """Have a start find other times than were measured."""
    kept = json.loads(path.read_text())
    kept["seconds"] = dict.fromkeys(kept["seconds"], times)
    path.write_text(json.dumps(kept))


def test_the_same_tokens_and_what_was_measured_is_kept(
    model: Path, cache: Path, own: Answer
) -> None:
    first = start(model, cache)
    assert first.tokens == own.tokens
    assert first.said.count("\n") == 1  # of linear layers and of norms
    assert "packed kernels for linear layers" in first.said
    assert "measured in" in first.said
    path = only_file(cache)
    kept = json.loads(path.read_text())
    assert set(kept["seconds"]["384x128 fp32"]) >= {"1", "8", "64"}

    decide(path, {"1": (1.0, 2.0), "512": (1.0, 2.0)})
    before = path.stat().st_mtime_ns
    second = start(model, cache)
    assert second.tokens == own.tokens
    assert "measured before" in second.said
    assert path.stat().st_mtime_ns == before
    assert len(second.kernels) == 10  # four a layer, the embedding and the LM head
    assert set(second.kernels) == {OURS}
    assert second.freed.count(False) == 2  # of the embedding and the LM head

    decide(path, {"1": (1.0, 2.0), "8": (1.0, 2.0), "32": (2.0, 1.0)})
    both = start(model, cache)
    assert both.tokens == own.tokens
    assert both.said.count("up to 16 rows") == 4
    assert set(both.kernels) == {OURS}

    decide(path, {"1": (2.0, 1.0)})
    neither = start(model, cache)
    assert neither.tokens == own.tokens
    assert neither.said.count("left to vLLM") == 5
    assert OURS not in neither.kernels


def test_compiled_by_vllm_both_kernels_serve_their_rows(
    model: Path, cache: Path, own: Answer
) -> None:
    start(model, cache)
    decide(only_file(cache), {"1": (1.0, 2.0), "8": (1.0, 2.0), "32": (2.0, 1.0)})
    compiled = start(model, cache, llm={"enforce_eager": False})
    assert "up to 16 rows" in compiled.said
    assert compiled.tokens == own.tokens


@pytest.mark.parametrize("names_of_layers", ["0", "1"])
def test_the_ranges_as_a_backend_say_the_same(
    model: Path, cache: Path, own: Answer, names_of_layers: str
) -> None:
    backend = "splitpoint.integrations.vllm.ranges.backend"
    config = {"mode": 2, "backend": backend, "custom_ops": ["none"]}
    config["compile_ranges_endpoints"] = [2, 16]
    answer = start(
        model,
        cache,
        llm={"enforce_eager": False, "compilation_config": config},
        env={"VLLM_USE_AOT_COMPILE": "0", "VLLM_USE_LAYERNAME": names_of_layers},
    )
    assert answer.tokens == own.tokens
    assert "splitpoint.runtime.program" in answer.imported


RANGES = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 2,
        "backend": "splitpoint",
        "custom_ops": ["none"],
        "compile_ranges_endpoints": [2, 16],
    },
}
LOADED = "as they were kept: nothing is compiled"


def test_a_second_start_compiles_nothing(model: Path, cache: Path, own: Answer) -> None:
    def again() -> Answer:
        answer = start(model, cache, llm=RANGES, env={"VLLM_USE_LAYERNAME": "0"})
        assert answer.tokens == own.tokens
        return answer

    first = again()
    assert "pieces compiled, 0 from the store" in first.said
    assert LOADED not in first.said
    second = again()
    assert LOADED in second.said
    assert "pieces compiled" not in second.said

    # What was captured depends on which kernels layers were given.
    decide(only_file(cache), {"1": (2.0, 1.0)})
    other = again()
    assert LOADED not in other.said
    assert LOADED in again().said

    # Without the store vLLM is told that it has to compile.
    shutil.rmtree(cache / "store")
    anew = again()
    assert LOADED not in anew.said
    assert "pieces compiled, 0 from the store" in anew.said


def test_without_a_compiler_vllm_goes_on_with_its_own(
    model: Path, tmp_path: Path, own: Answer
) -> None:
    answer = start(model, tmp_path, env={"CXX": "/no/compiler"})
    assert answer.tokens == own.tokens
    assert "because of KernelBuildError: the C++ kernels need a C++ compiler" in answer.said
    assert OURS not in answer.kernels


def test_threads_on_one_core_are_left_to_vllm(model: Path, cache: Path) -> None:
    taskset = shutil.which("taskset")
    if taskset is None:
        pytest.skip("taskset is not installed")
    core = str(min(os.sched_getaffinity(0)))
    answer = start(model, cache, (taskset, "-c", core), env={"OMP_NUM_THREADS": "2"})
    assert "because of SharedCores: 2 threads share 1 core" in answer.said
    assert OURS not in answer.kernels


def test_a_vllm_with_other_names_is_left_alone(model: Path, cache: Path, own: Answer) -> None:
    change = """if True:
    import vllm.model_executor.layers.utils as utils
    original = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = (
        lambda layer, remove_weight, _call=original: _call(layer, remove_weight)
    )
    """
    # The plug-in may look before a change of this test can be made: it is called once more.
    change += """
    import splitpoint.integrations.vllm as plugin
    plugin.register()
    """
    answer = start(model, cache, before=change, env={"VLLM_PLUGINS": "none"})
    assert "because of UnsupportedVllm" in answer.said
    assert "dispatch_cpu_unquantized_gemm takes" in answer.said
    assert answer.tokens == own.tokens
    assert OURS not in answer.kernels


def test_what_fails_half_way_leaves_each_layer_with_a_kernel(
    model: Path, cache: Path, own: Answer
) -> None:
    start(model, cache)
    decide(only_file(cache), {"1": (1.0, 2.0)})
    change = """if True:
    from splitpoint.kernels.memory import Streamed
    placed, count = Streamed.placed, iter(range(100))
    def fails(self, tensor, placed=placed, count=count):
        if next(count) == 3:
            raise MemoryError("no more")
        return placed(self, tensor)
    Streamed.placed = fails
    """
    answer = start(model, cache, before=change)
    assert "because of MemoryError: no more" in answer.said
    assert answer.tokens == own.tokens
    assert answer.kernels.count(OURS) == 4  # the embedding's too, which packs when it is called
