"""Configurations from files: our own, and pasted from vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpoint import Config
from splitpoint.cli.config_file import read_config
from splitpoint.cli.vllm_config import PASS_RULES, RULES
from splitpoint.errors import (
    ConflictingFields,
    InvalidField,
    InvalidJSON,
    NonIntegerPoint,
    PointAboveMax,
    UnknownField,
    UnsupportedField,
    UsageError,
)

POINTS = st.lists(st.integers(1, 500), unique=True, max_size=5).map(sorted)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "config.json"


def read(path: Path, data: Any, **overrides: Any) -> tuple[Config, list[str]]:
    path.write_text(json.dumps(data))
    return read_config(path, overrides)


@given(POINTS, POINTS)
def test_our_own_round_trip(scratch: Path, split: list[int], sizes: list[int]):
    config = Config(max_size=500, split_points=split, compile_sizes=sizes, hint="middle")
    scratch.write_text(config.to_json())
    read_back, left_out = read_config(scratch, {})
    assert read_back.to_json() == config.to_json()
    assert left_out == []


def test_where_vllm_keeps_its_artifacts_is_no_place_for_ours(scratch: Path):
    with pytest.raises(UnsupportedField, match="cache_dir='/vllm'"):
        read(scratch, {"mode": 3, "cache_dir": "/vllm"})
    config, left_out = read(scratch, {"mode": 3, "cache_dir": ""})
    assert (config.cache_dir, left_out) == (None, ["cache_dir", "mode"])
    config, left_out = read(scratch, {"max_size": 8, "cache_dir": "/ours"})
    assert (config.cache_dir, left_out) == ("/ours", [])


@given(POINTS, POINTS, st.sets(st.sampled_from(sorted(RULES))))
def test_a_vllm_snippet_with_fields_that_ask_for_nothing(
    scratch: Path, split: list[int], sizes: list[int], others: set[str]
):
    nothing = {name: [*RULES[name].asks_nothing, None][0] for name in others}
    data = {"compile_ranges_split_points": split, "compile_sizes": sizes, **nothing}
    config, left_out = read(scratch, data)
    assert config == Config(split_points=split, compile_sizes=sizes)
    assert left_out == sorted(others)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_field_that_asks_for_what_is_not_here_is_refused_by_name(scratch: Path, name: str):
    for value in (17, "something", ["something"]):
        with pytest.raises(UnsupportedField, match=f"{name}="):
            read(scratch, {"compile_ranges_split_points": [8], name: value})


@pytest.mark.parametrize("name", sorted(PASS_RULES))
def test_a_pass_that_is_not_here_is_refused_by_name(scratch: Path, name: str):
    with pytest.raises(UnsupportedField, match=f"pass_config.{name}="):
        read(scratch, {"pass_config": {name: 17 if "max" in name else True}})
    config, _ = read(scratch, {"pass_config": {name: None}})
    assert [each.name for each in config.passes] == ["NoopElimination"]


DOCUMENTED = {  # as vLLM's documentation and pull requests write them
    "now": (
        {"compile_ranges_endpoints": [8], "pass_config": {"fuse_allreduce_rms": True}},
        ["NoopElimination", "AllReduceRMSNorm"],
    ),
    "before": (
        {"mode": 3, "pass_config": {"enable_fi_allreduce_fusion": True, "enable_noop": True}},
        ["NoopElimination", "AllReduceRMSNorm"],
    ),
    "sequence parallel": (
        {"pass_config": {"enable_sp": True, "fuse_allreduce_rms": True, "sp_min_token_num": 64}},
        ["NoopElimination", "SequenceParallel", "AllReduceRMSNorm"],
    ),
    "all off": (
        {
            "level": 3,
            "custom_ops": ["none"],
            "pass_config": {
                "enable_fusion": False,
                "enable_sequence_parallelism": False,
                "eliminate_noops": False,
            },
        },
        [],
    ),
    "nothing": ({"mode": 3, "pass_config": {}}, ["NoopElimination"]),
}


@pytest.mark.parametrize("case", DOCUMENTED)
def test_passes_of_vllm_are_ours(scratch: Path, case: str):
    data, names = DOCUMENTED[case]
    config, _ = read(scratch, data, max_size=512)
    assert [each.name for each in config.passes] == names
    assert Config.from_json(config.to_json()) == config
    split = [each for each in config.passes if each.name == "SequenceParallel"]
    assert [each.min_size for each in split] == [64] * len(split)


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        ({"enable_sp": True, "enable_async_tp": True}, UnsupportedField, "enable_async_tp=True"),
        ({"fuse_everything": True}, UnknownField, "no pass_config.fuse_everything"),
        ({"enable_sp": True, "enable_sequence_parallelism": False}, ConflictingFields, "two names"),
        ({"eliminate_noops": 1}, InvalidField, "true or false"),
        ([], InvalidField, "an object of switches"),
    ],
)
def test_passes_that_cannot_be_given(scratch: Path, given_: Any, error: Any, message: str):
    with pytest.raises(error, match=message):
        read(scratch, {"pass_config": given_})


def test_inductor_options_of_vllm(scratch: Path):
    data = {"mode": 3, "inductor_compile_config": {"max_autotune": True}}
    assert read(scratch, data)[0].inductor_options == {"max_autotune": True}


def test_vllm_nulls_stand_for_defaults(scratch: Path):
    data = {"mode": 3, "backend": "", "splitting_ops": None, "compile_ranges_split_points": [8]}
    config, _ = read(scratch, data)
    assert config == Config(split_points=[8])


def test_vllm_capture_sizes_by_name(scratch: Path):
    data = {"compile_sizes": [3, "cudagraph_capture_sizes"], "cudagraph_capture_sizes": [4, 1]}
    config, left_out = read(scratch, data)
    assert list(config.compile_sizes) == [1, 3, 4]
    assert left_out == []
    with pytest.raises(InvalidField, match="write the sizes themselves"):
        read(scratch, {"mode": 3, "compile_sizes": ["cudagraph_capture_sizes"]})
    with pytest.raises(NonIntegerPoint):
        read(scratch, data | {"cudagraph_capture_sizes": ["x"]})


@pytest.mark.parametrize("name", ["split_points", "compile_ranges_split_points"])
def test_flags_replace_fields(scratch: Path, name: str):
    config, _ = read(scratch, {name: [8], "compile_sizes": [2]}, split_points=[4], max_size=64)
    assert config == Config(split_points=[4], compile_sizes=[2], max_size=64)


def test_a_misspelt_field_is_no_vllm_field(scratch: Path):
    with pytest.raises(UnknownField, match="compile_ranges_split_point'"):
        read(scratch, {"mode": 3, "compile_ranges_split_point": [8]})


def test_config_still_checks(scratch: Path):
    with pytest.raises(PointAboveMax):
        read(scratch, {"split_points": [8]}, max_size=4)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot read"):
        read_config(tmp_path / "missing.json", {})
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read"):
        read_config(binary, {})
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(InvalidJSON, match=r"broken\.json is not JSON"):
        read_config(broken, {})
    with pytest.raises(InvalidJSON, match="must hold a JSON object, got list"):
        read(tmp_path / "list.json", [1])
