"""What splitpoint is compared with runs the same model, or says why it does not."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from splitpoint.bench.baseline import Baseline, Setting
from splitpoint.bench.baselines import BASELINES
from splitpoint.bench.check import Expected
from splitpoint.bench.inputs import CompiledForward, call_each, last_logits, random_ids
from splitpoint.cli.arguments import shared
from splitpoint.config import Activations, Weights
from splitpoint.errors import BaselineFailed

from .. import tiny


def setting(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Setting:
    return Setting(tiny.model(dtype), "tiny", **changes)


def installed(name: str, given: Setting | None = None) -> Baseline:
    baseline = BASELINES[name]
    if reason := baseline.unavailable(given or setting(weights="int8")):
        pytest.skip(reason)
    return baseline


def test_the_command_line_names_all():
    assert set(shared.BASELINES) == set(BASELINES)


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES)
def test_what_cannot_run_says_what_to_do(baseline: Baseline):
    reason = baseline.unavailable(setting(weights="int8"))
    assert reason is None or "install" in reason or "cannot be loaded" in reason


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_it_runs_the_model(name: str):
    baseline = installed(name)
    if baseline.rounds(setting(weights="int8")) is not None:
        pytest.skip("it has a test of its own below")
    model = tiny.OneLinear(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sizes = [3] if baseline.per_size else [1, 3]
    forward = baseline.build(baseline.prepare(Setting(model, "tiny")), sizes)
    error = Expected(model, sizes).check(name, forward)
    assert 0 < error < 0.01 or (name == "fp32" and error == 0)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    if name in ("max-autotune", "zentorch"):
        assert frozen_modules(), "weights were no constants, so nothing was tuned over them"
    baseline.release(forward)
    assert not frozen_modules()
    assert not torch._inductor.config.freezing
    assert torch._inductor.config.joint_custom_post_pass is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("torchao", "int8", None),
        ("torchao", "int8", "int8"),
        ("torchao", "int4", None),
        ("llamacpp", None, None),
        ("llamacpp", "int8", None),
        ("llamacpp", "int4", None),
    ],
)
def test_what_rounds_in_its_own_way_is_off_by_what_rounding_explains(
    name: str,
    weights: Weights | None,
    activations: Activations | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SPLITPOINT_CACHE", str(tmp_path))
    given = setting(weights=weights, activations=activations)
    baseline = installed(name, given)
    rounds = baseline.rounds(given)
    assert (rounds and rounds.weights) == weights
    sizes = [1, 3, 40]
    if rounds is None:
        expected = Expected(given.model, sizes)
    else:
        expected = Expected(
            given.model, sizes, rounds.weights, rounds.activations, own_rounding=True
        )
        assert 0 < expected.eager_error < expected.limit < 0.5
    before = {key: value.clone() for key, value in given.model.state_dict().items()}
    forward = baseline.build(baseline.prepare(given), sizes)
    assert expected.check(name, forward) > 0
    after = given.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    baseline.release(forward)
    assert not frozen_modules()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zentorch_runs_one_token_and_more(dtype: torch.dtype):
    given = setting(dtype)
    baseline = installed("zentorch", given)
    forward = baseline.build(baseline.prepare(given), [1, 3, 40])
    assert Expected(given.model, [1, 3, 40, 7]).check("zentorch", forward) > 0
    assert given.model.config._attn_implementation == "sdpa"
    baseline.release(forward)


def test_torchao_is_for_rounded_weights():
    reason = BASELINES["torchao"].unavailable(setting())
    assert reason is not None
    assert "--weights" in reason or "install" in reason


def frozen_modules() -> list[str]:
    """Modules that Inductor wrote and that hold constant weights."""
    return [
        name
        for name, module in sys.modules.items()
        if "compile_tasks" in name and hasattr(module, "_frozen_param0")
    ]


def test_openvino_that_falls_back_is_an_error():
    baseline = installed("openvino")
    prepared = baseline.prepare(setting())
    prepared.model.bfloat16()  # which its backend does not know, and leaves to torch
    with pytest.raises(BaselineFailed, match=r"did not run the model itself at size 2: .*bfloat16"):
        baseline.build(prepared, [2])


def test_vllm_replaces_every_linear_layer_and_copies_nothing_else():
    model = tiny.model(torch.bfloat16)
    changed = installed("vllm").prepare(Setting(model))
    assert not [m for m in changed.modules() if isinstance(m, torch.nn.Linear)]
    mine = {id(p) for p in model.parameters()}
    assert {id(p) for p in changed.parameters()} <= mine


class TestCompiledForward:
    def test_two_share_no_graph_and_forgotten_ones_go(self):
        graphs: list[weakref.ref[torch.fx.GraphModule]] = []

        def backend(graph, example_inputs):
            graphs.append(weakref.ref(graph))
            return graph.forward

        model = tiny.model()
        first = CompiledForward(model, backend=backend, dynamic=False, fullgraph=True)
        second = CompiledForward(model, backend=backend, dynamic=False, fullgraph=True)
        for forward in (first, first, second):
            call_each(forward, [2])
        assert len(graphs) == 2
        ids = random_ids(tiny.VOCABULARY, 2)
        assert torch.equal(first(ids), last_logits(model)(ids))
        second.forget()
        del second, forward
        gc.collect()
        assert [graph() is None for graph in graphs] == [False, True]

    def test_output_is_copied_where_it_would_be_overwritten(self):
        buffer = torch.empty(1, tiny.VOCABULARY)

        def backend(graph, example_inputs):
            return lambda *args: (buffer.copy_(graph(*args)[0]),)

        model = tiny.model()
        forward = CompiledForward(model, copy_output=True, backend=backend, dynamic=False)
        one, other = (random_ids(tiny.VOCABULARY, 2, seed) for seed in (0, 1))
        kept = forward(one)
        forward(other)
        assert torch.equal(kept, last_logits(model)(one))
