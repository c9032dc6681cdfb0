"""Configurations from files: our own, and pasted from vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpoint import Config
from splitpoint.config_file import VLLM_ONLY, read_config
from splitpoint.errors import (
    InvalidJSON,
    NonIntegerPoint,
    PointAboveMax,
    UnknownField,
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
    config, left_out = read(scratch, {"mode": 3, "cache_dir": "/vllm"})
    assert (config.cache_dir, left_out) == (None, ["cache_dir", "mode"])
    config, left_out = read(scratch, {"max_size": 8, "cache_dir": "/ours"})
    assert (config.cache_dir, left_out) == ("/ours", [])


@given(POINTS, POINTS, st.sets(st.sampled_from(sorted(VLLM_ONLY))))
def test_a_vllm_snippet(scratch: Path, split: list[int], sizes: list[int], others: set[str]):
    data = {"compile_ranges_split_points": split, "compile_sizes": sizes}
    config, left_out = read(scratch, data | dict.fromkeys(others, 1))
    assert config == Config(split_points=split, compile_sizes=sizes)
    assert left_out == sorted(others)


def test_vllm_nulls_stand_for_defaults(scratch: Path):
    data = {"mode": 3, "backend": "", "splitting_ops": None, "compile_ranges_split_points": [8]}
    config, _ = read(scratch, data)
    assert config == Config(split_points=[8])


def test_vllm_capture_sizes_by_name(scratch: Path):
    data = {"compile_sizes": [3, "cudagraph_capture_sizes"], "cudagraph_capture_sizes": [4, 1]}
    config, left_out = read(scratch, data)
    assert list(config.compile_sizes) == [1, 3, 4]
    assert left_out == ["cudagraph_capture_sizes"]
    with pytest.raises(UsageError, match="write the sizes themselves"):
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
