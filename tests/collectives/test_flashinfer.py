import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from splitpoint import errors
from splitpoint.collectives import flashinfer, reference

from ..passes.groups import one_rank
from . import signatures

SNAPSHOT = json.loads(signatures.SNAPSHOT.read_text())
HIDDEN = 64
CASES = [
    (quant, residual, want_norm)
    for quant in reference.QUANTS
    for residual in (False, True)
    for want_norm in (False, True)
]


@pytest.mark.parametrize(("quant", "residual", "want_norm"), CASES)
def test_calls_bind_to_the_signature_and_have_what_each_pattern_asks_for(
    quant, residual, want_norm
):
    x = torch.randn(3, 5, HIDDEN, dtype=torch.bfloat16)
    scale = torch.tensor(0.5) if quant in ("fp8_static", "nvfp4") else None
    pattern, arguments = flashinfer.fusion_call(
        x,
        torch.randn_like(x) if residual else None,
        torch.rand(HIDDEN, dtype=torch.bfloat16),
        scale,
        eps=1e-6,
        weight_bias=0.0,
        quant=quant,
        want_norm=want_norm,
        algorithm="one_shot",
    )
    more = {"workspace": None, "pattern": 0} | ({"layout_code": 2} if quant == "nvfp4" else {})
    bound = signatures.signature(SNAPSHOT["functions"]["allreduce_fusion"]).bind(
        **more, **arguments
    )
    given = bound.arguments
    assert pattern in SNAPSHOT["constants"]["AllReduceFusionPattern"]
    assert given["use_oneshot"] is True
    rows = (15, HIDDEN)
    for name in ("input", "residual_in", "residual_out"):
        assert given[name].shape == rows
        assert given[name].is_contiguous()
    assert residual or given["residual_in"].count_nonzero() == 0
    assert (given["norm_out"] is not None) == (want_norm or quant == "none")
    # "Out" patterns are those that write the norm beside the quantised.
    assert ("Out" in pattern) == (want_norm and quant != "none")
    assert given.get("scale_factor") is scale
    shapes = {
        "fp8_static": (rows, None),
        "fp8_token": (rows, (15, 1)),
        "nvfp4": ((15, HIDDEN // 2), (15, HIDDEN // 16)),
        "none": (None, None),
    }[quant]
    for name, shape in zip(("quant_out", "scale_out"), shapes, strict=True):
        assert (given[name].shape if name in given else None) == shape
    if quant == "fp8_token":
        assert given["scale_out"].dtype == torch.float32


def test_the_workspace_call_binds(tmp_path):
    with one_rank(tmp_path) as group:
        arguments = flashinfer.workspace_arguments(
            group, max_tokens=128, hidden=HIDDEN, dtype=torch.bfloat16
        )
    entry = SNAPSHOT["functions"]["create_allreduce_fusion_workspace"]
    bound = signatures.signature(entry).bind(**arguments).arguments
    assert (bound["world_size"], bound["rank"], bound["max_token_num"]) == (1, 0, 128)


def test_what_is_called_is_exported_with_the_names_that_are_used():
    named = {*signatures.FUNCTIONS, *signatures.CONSTANTS}
    assert set(SNAPSHOT["exported"]) == named
    patterns = SNAPSHOT["constants"]["AllReduceFusionPattern"]
    assert set(flashinfer.PATTERNS.values()) <= set(patterns)
    assert flashinfer.SCALE_LAYOUT in SNAPSHOT["constants"]["QuantizationSFLayout"]
    assert {quant for quant, _ in flashinfer.PATTERNS} == set(reference.QUANTS)


def test_the_snapshot_is_that_of_the_installed_package():
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        pytest.skip("flashinfer-python is not installed: nothing to compare the snapshot with")
    found = signatures.read(Path(spec.origin).parent)
    known = {key: SNAPSHOT[key] for key in found}
    assert found == known, f"snapshot of {SNAPSHOT['version']}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, True),
        ({"quant": "fp8_token"}, True),
        ({"quant": "fp8_token", "weight_bias": 1.0}, False),
        ({"residual": torch.zeros(2, HIDDEN)}, False),
        ({"weight": torch.zeros(HIDDEN)}, False),
        ({"input": torch.zeros(2, HIDDEN)}, False),
        ({"input": torch.zeros(0, HIDDEN, dtype=torch.bfloat16)}, False),
        ({"max_elements": 2 * HIDDEN - 1}, False),
    ],
)
def test_what_flashinfer_does_not_have_is_not_asked_of_it(change, said):
    given = {
        "input": torch.zeros(2, HIDDEN, dtype=torch.bfloat16),
        "residual": torch.zeros(2, HIDDEN, dtype=torch.bfloat16),
        "weight": torch.zeros(HIDDEN, dtype=torch.bfloat16),
        "weight_bias": 0.0,
        "quant": "none",
        "max_elements": 2 * HIDDEN,
        "dtype": torch.bfloat16,
    }
    assert flashinfer.serves(**(given | change)) is said


def test_without_a_workspace_a_call_is_served_by_the_reference(tmp_path):
    x, w = torch.randn(2, HIDDEN), torch.rand(HIDDEN)
    with one_rank(tmp_path):
        out = flashinfer.allreduce_rmsnorm(x, None, w, None, group="0", eps=1e-6)
        expected = reference.allreduce_rmsnorm(x, None, w, None, group="0", eps=1e-6)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("world_size", "dtype", "said"),
    [
        (3, torch.bfloat16, "the group has 3"),
        (2, torch.float32, "not torch.float32"),
    ],
)
def test_what_no_gpu_would_change_is_refused_first(world_size, dtype, said):
    assert said in flashinfer.unsupported(world_size, dtype)


def test_attaching_where_it_cannot_be_served_is_an_error_that_says_why(tmp_path):
    with one_rank(tmp_path), pytest.raises(errors.WorkspaceError, match=r"rank 0: .* has 1"):
        flashinfer.attach(dist.group.WORLD, max_tokens=8, hidden=HIDDEN, dtype=torch.bfloat16)
    assert flashinfer.attached() == frozenset()
