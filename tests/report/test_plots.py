"""The curve: looked at as pixels, since a picture that is written can still be empty."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from splitpoint import Config, Plan
from splitpoint.report.plots import FAINT, INK, MARKERS, PAPER, STYLES, save_curves

SIZES = (1, 4, 16, 64)
PLAN = Config(max_size=64, split_points=[8]).plan()


def pixels(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]


def count(image: np.ndarray, colour: str) -> int:
    return int((np.abs(image - to_rgb(colour)).max(axis=-1) < 0.02).sum())


def draw(path: Path, plan: Plan = PLAN, **series: list[float]) -> np.ndarray:
    save_curves(path, SIZES, series, plan, title="tiny")
    return pixels(path)


def test_each_series_is_drawn_in_its_colour(tmp_path: Path):
    one = draw(tmp_path / "one.png", first=[1.0, 2.0, 4.0, 9.0])
    two = draw(tmp_path / "two.png", first=[1.0, 2.0, 4.0, 9.0], second=[2.0, 4.0, 8.0, 20.0])
    assert count(one, STYLES[0]) > 500
    assert count(one, STYLES[1]) == 0
    assert count(two, STYLES[1]) > 500


def test_range_boundaries_are_drawn(tmp_path: Path):
    times = [1.0, 2.0, 4.0, 9.0]
    whole = Config(max_size=64).plan()
    without = draw(tmp_path / "without.png", whole, first=times)
    with_one = draw(tmp_path / "with.png", PLAN, first=times)
    assert count(with_one, FAINT) > count(without, FAINT) + 300


def test_the_floor_is_a_line_of_its_own_and_gaps_are_left(tmp_path: Path):
    times = {"first": [1.0, math.nan, 4.0, 9.0]}
    bare, floored = tmp_path / "bare.png", tmp_path / "floored.png"
    save_curves(bare, SIZES, times, PLAN, title="tiny")
    save_curves(floored, SIZES, times, PLAN, title="tiny", floor=[0.5, 1.0, 2.0, 8.0])
    assert count(pixels(floored), INK) > count(pixels(bare), INK) + 300
    whole = draw(tmp_path / "whole.png", first=[1.0, 2.0, 4.0, 9.0])
    assert 20 < count(pixels(bare), STYLES[0]) < count(whole, STYLES[0])


def test_eight_series_each_have_a_style(tmp_path: Path):
    image = draw(tmp_path / "all.png", **{f"n{i}": [i + 1.0] * 4 for i in range(8)})
    assert all(count(image, colour) > 200 for colour in STYLES)
    assert len(set(STYLES)) == len(STYLES) == len(MARKERS) == 8


def test_the_paper_is_opaque(tmp_path: Path):
    path = tmp_path / "curve.png"
    draw(path, first=[1.0, 2.0, 4.0, 9.0])
    whole = matplotlib.image.imread(path)
    assert whole.shape[0] > 500
    assert whole.shape[1] > 800
    assert (whole[..., 3:] == 1).all(), "a dark page would shine through"
    assert count(whole[..., :3], PAPER) > whole.shape[0] * whole.shape[1] / 2


def test_no_global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    draw(tmp_path / "curve.png", first=[1.0, 2.0, 4.0, 9.0])
    assert "matplotlib.pyplot" not in sys.modules


def test_one_size_alone(tmp_path: Path):
    save_curves(tmp_path / "one.png", [4], {"first": [2.0]}, PLAN, title="tiny")
    assert count(pixels(tmp_path / "one.png"), STYLES[0]) > 20
