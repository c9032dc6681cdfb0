"""Curves of time against size, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..ranges import Plan

# An opaque light paper and dark ink: the picture brings its background with it, so that it
# reads the same on a light page and on a dark one.
PAPER, INK, FAINT = "#f7f7f5", "#26282b", "#c9cbcf"
STYLES = (
    *("#8a8f98", "#d9822b", "#1f6fb2", "#7a4fa3"),
    *("#2f8f5b", "#c2417c", "#8c6d1f", "#5fb3c8"),
)
"""One colour for each line, told apart also by their lightness."""
MARKERS = "so^DvPX<"


def save_curves(
    path: Path,
    sizes: Sequence[int],
    series: Mapping[str, Sequence[float]],
    plan: Plan | None,
    *,
    title: str,
    floor: Sequence[float] | None = None,
    bars: Mapping[str, float] | None = None,
) -> None:
    """Draw one line for each of `series` (name -> milliseconds a call at each of `sizes`).

    There are styles for eight. Where a value is nan, the line has a gap. `floor`, what no series
    should be under, is dashed. Both axes are logarithmic. The ends of a plan's ranges are faint
    vertical lines, and each range wide enough is named above the plot. `bars`, tokens a second by
    name, stand beside them in the colours of their lines. The folder of `path` must exist.
    """
    width = 8.4 if bars is None else 11.0
    figure = Figure(figsize=(width, 5.2), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    if bars is None:
        axes = figure.add_subplot(facecolor=PAPER)
    else:
        grid = figure.add_gridspec(1, 2, width_ratios=[1, 3])
        colours = dict(zip(series, STYLES, strict=False))
        _rates(figure.add_subplot(grid[0], facecolor=PAPER), bars, colours)
        axes = figure.add_subplot(grid[1], facecolor=PAPER)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for (name, times), colour, marker in zip(series.items(), STYLES, MARKERS, strict=False):
        axes.plot(sizes, times, marker, ls="-", color=colour, lw=2, ms=5, label=name)
    if floor is not None:
        axes.plot(sizes, floor, ls=(0, (4, 3)), color=INK, lw=1.2, label="floor", zorder=1)
    if plan is not None:
        _ranges(axes, plan, sizes)
    _axes(axes, sizes)
    figure.suptitle(title, color=INK, fontsize=12)
    figure.legend(
        frameon=False,
        labelcolor=INK,
        loc="outside lower center",
        ncols=min(4, len(series) + (floor is not None)),
        fontsize=10,
    )
    figure.savefig(path, format="png", facecolor=PAPER)


def _rates(axes: Axes, bars: Mapping[str, float], colours: Mapping[str, str]) -> None:
    drawn = axes.bar(list(bars), list(bars.values()), color=[colours[name] for name in bars])
    axes.bar_label(drawn, fmt="%.1f", color=INK, fontsize=10, padding=2)
    axes.set_ylabel("answering: tokens a second after the first", color=INK)
    axes.margins(x=0.15, y=0.08)
    frame(axes)


def frame(axes: Axes) -> None:
    """Axes on the left and below, faint lines behind what is drawn."""
    axes.tick_params(which="both", colors=INK)
    axes.grid(axis="y", which="major", color=FAINT, lw=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def _ranges(axes: Axes, plan: Plan, sizes: Sequence[int]) -> None:
    low, high = min(sizes), max(sizes)
    for range_ in plan.ranges:
        # A boundary lies between the last size of a range and the first of the next.
        left, right = max(range_.start - 0.5, low), min(range_.end + 0.5, high)
        if right >= 1.4 * left:  # else its name is wider than the range
            axes.annotate(
                str(range_),
                (math.sqrt(left * right), 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=INK,
                fontsize=8,
            )
        for boundary in (left, right):
            if low < boundary < high:
                axes.axvline(boundary, color=FAINT, lw=1, zorder=0)


def _axes(axes: Axes, sizes: Sequence[int]) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("size (tokens)", color=INK)
    axes.set_ylabel("time per call (ms)", color=INK)
    axes.set_xticks(list(sizes))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    frame(axes)
