"""What splitpoint is compared with runs the same model, or says why it does not."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch

from splitpoint.bench.baselines import BASELINES, Baseline
from splitpoint.bench.check import Expected
from splitpoint.bench.inputs import CompiledForward, call_each, last_logits, random_ids
from splitpoint.cli.arguments import shared
from splitpoint.errors import BaselineFailed

from .. import tiny


def installed(name: str) -> Baseline:
    baseline = BASELINES[name]
    if reason := baseline.unavailable(torch.bfloat16):
        pytest.skip(reason)
    return baseline


def test_the_command_line_names_all():
    assert set(shared.BASELINES) == set(BASELINES)


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES)
def test_what_cannot_run_says_what_to_do(baseline: Baseline):
    reason = baseline.unavailable(torch.bfloat16)
    assert reason is None or "install" in reason or "cannot be loaded" in reason


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_it_runs_the_model(name: str):
    baseline = installed(name)
    model = tiny.OneLinear(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sizes = [3] if baseline.per_size else [1, 3]
    forward = baseline.build(baseline.prepare(model), sizes)
    error = Expected(model, sizes).check(name, forward)
    assert 0 < error < 0.01 or (name == "fp32" and error == 0)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    if name == "max-autotune":
        assert frozen_modules(), "weights were no constants, so nothing was tuned over them"
    baseline.release(forward)
    assert not frozen_modules()
    assert not torch._inductor.config.freezing


def frozen_modules() -> list[str]:
    """Modules that Inductor wrote and that hold constant weights."""
    return [
        name
        for name, module in sys.modules.items()
        if "compile_tasks" in name and hasattr(module, "_frozen_param0")
    ]


def test_openvino_that_falls_back_is_an_error():
    baseline = installed("openvino")
    prepared = baseline.prepare(tiny.model(torch.bfloat16))
    prepared.model.bfloat16()  # which its backend does not know, and leaves to torch
    with pytest.raises(BaselineFailed, match=r"did not run the model itself at size 2: .*bfloat16"):
        baseline.build(prepared, [2])


def test_vllm_replaces_every_linear_layer_and_copies_nothing_else():
    model = tiny.model(torch.bfloat16)
    changed = installed("vllm").prepare(model)
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
