"""Groups of bars side by side, as PNG: how fast ways are, beside the slowest of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .plots import INK, PAPER, STYLES, frame

WIDTH = 0.82
"""Of a group's bars, where 1 would leave no gap between groups."""


@dataclass(frozen=True)
class Panel:
    """One of the plots of a picture."""

    what: str
    """What it is a time of."""
    series: Mapping[str, Sequence[float | None]]
    """Name -> milliseconds for each group; None where there are none."""
    floors: Sequence[float | None] = ()
    """Milliseconds of each group that no way should be under, dashed."""


def save_bars(path: Path, groups: Sequence[str], panels: Sequence[Panel], *, title: str) -> None:
    """Draw panels side by side, with one colour for each name; the slowest of a group is 1 high.
    The folder of `path` must exist."""
    figure = Figure(figsize=(11.0, 5.2), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    many = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(many, panels, strict=True):
        _panel(axes, groups, panel)
    figure.suptitle(title, color=INK, fontsize=12)
    handles, labels = many[-1].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        frameon=False,
        labelcolor=INK,
        loc="outside lower center",
        ncols=min(6, len(labels)),
        fontsize=10,
    )
    figure.savefig(path, format="png", facecolor=PAPER)


def _panel(axes: Axes, groups: Sequence[str], panel: Panel) -> None:
    axes.set_facecolor(PAPER)
    columns = list(zip(*panel.series.values(), strict=True))
    slowest = [max((ms for ms in column if ms is not None), default=1.0) for column in columns]
    width = WIDTH / max(1, len(panel.series))
    for at, ((name, values), colour) in enumerate(zip(panel.series.items(), STYLES, strict=False)):
        left = (at - (len(panel.series) - 1) / 2) * width
        known = [(group, ms) for group, ms in enumerate(values) if ms is not None]
        places = [group + left for group, _ in known]
        heights = [slowest[group] / ms for group, ms in known]
        drawn = axes.bar(places, heights, 0.92 * width, color=colour, label=name)
        times = [f"{ms:.3g}" for _, ms in known]
        axes.bar_label(drawn, times, color=INK, fontsize=7, padding=1)
    label = "floor"
    for group, floor in enumerate(panel.floors):
        if floor is not None:
            ends = [group - WIDTH / 2, group + WIDTH / 2]
            height = slowest[group] / floor
            axes.plot(ends, [height] * 2, ls=(0, (4, 3)), color=INK, lw=1.2, label=label)
            label = "_again"
    axes.set_xticks(range(len(groups)), groups)
    axes.set_title(panel.what, color=INK, fontsize=10)
    axes.set_ylabel("times as fast as the slowest", color=INK)
    frame(axes)
