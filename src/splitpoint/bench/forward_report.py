"""What `splitpoint bench forward` measured: rows, tables, JSON."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..ranges import Plan, PlannedRange, align
from .baselines import BASELINES

NOISY = 0.2
"""An interquartile spread above which a median of a few repeats tells little."""

WIDTH = 118
"""Columns that a line of text is broken at."""


@dataclass(frozen=True)
class Measured:
    """A median in milliseconds a call, and its spread (see `Timing.spread`)."""

    ms: float
    spread: float
    repeats: int = 0
    """It is the median of so many; 0 where that is not known."""


@dataclass(frozen=True)
class Floor:
    """The least that a size can take, at the best rates that were seen in the run."""

    ms: float
    read_gb_s: float
    """Gigabytes (1e9) a second read from memory."""
    peak_gflop_s: float
    """1e9 operations a second, at the most that was seen."""


@dataclass(frozen=True)
class Row:
    """One size."""

    size: int
    dtype: str
    threads: int
    variant: str
    """Kernels of the linear layers at this size, see `variant_of`."""
    eager: Measured
    torch_compile: Measured
    splitpoint: Measured
    floor: Floor | None = None
    """None where memory could not be read: its kernel was not built."""
    singles: Mapping[str, Measured] = field(default_factory=dict)
    """This package with one range and one kernel for all sizes, by kernel."""
    baselines: Mapping[str, Measured] = field(default_factory=dict)
    """Other ways to run the model, by name; without those that failed at this size."""

    @property
    def ratio(self) -> float:
        """torch.compile over splitpoint: above 1, splitpoint is the faster."""
        return self.torch_compile.ms / self.splitpoint.ms

    @property
    def floor_share(self) -> float | None:
        """The share of the floor that splitpoint reaches: 1.0 is the floor itself."""
        return self.floor.ms / self.splitpoint.ms if self.floor else None

    @property
    def measured(self) -> dict[str, Measured]:
        """All medians, by name."""
        return {
            "eager": self.eager,
            "torch.compile": self.torch_compile,
            "splitpoint": self.splitpoint,
            **{f"only {name}": single for name, single in self.singles.items()},
            **self.baselines,
        }

    def to_json(self) -> dict[str, Any]:
        """The row with plain names, times in milliseconds."""
        floor = self.floor
        return {
            "size": self.size,
            "dtype": self.dtype,
            "threads": self.threads,
            "variant": self.variant,
            "eager_ms": self.eager.ms,
            "torch_compile_ms": self.torch_compile.ms,
            "splitpoint_ms": self.splitpoint.ms,
            "ratio": self.ratio,
            "eager_spread": self.eager.spread,
            "torch_compile_spread": self.torch_compile.spread,
            "splitpoint_spread": self.splitpoint.spread,
            "repeats": {name: one.repeats for name, one in self.measured.items()},
            "floor_ms": floor.ms if floor else None,
            "floor_share": self.floor_share,
            "read_gb_s": floor.read_gb_s if floor else None,
            "peak_gflop_s": floor.peak_gflop_s if floor else None,
            "singles": {name: asdict(one) for name, one in self.singles.items()},
            "baselines": {
                name: asdict(one) | {"ratio": one.ms / self.splitpoint.ms}
                for name, one in self.baselines.items()
            },
        }


@dataclass(frozen=True)
class Verdict:
    """How a baseline compares with splitpoint over all sizes."""

    sizes: int
    """At how many it was timed."""
    least_at: int
    """The size with the least ratio."""
    least_ratio: float
    """Its time over splitpoint's there: 1 or more, and splitpoint is slower nowhere."""
    cold_ratio: float | None
    """The CPU time to compile it for these sizes from empty caches, over that of splitpoint's
    ranges, which serve all of them."""


@dataclass(frozen=True)
class ForwardReport:
    """The outcome of a comparison; `print` it for the tables."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    plan: Plan
    """The ranges splitpoint ended up with; the same ones are in `environment["plan"]`."""

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...], "verdicts": {...}}`."""
        rows = []
        for row in self.rows:
            data = row.to_json()
            best = self.best_single
            data["best_single"] = best
            data["best_single_ms"] = row.singles[best].ms if best else None
            rows.append(data)
        verdicts = {name: asdict(verdict) for name, verdict in self.verdicts().items()}
        found = {"environment": self.environment, "rows": rows, "verdicts": verdicts}
        return json.dumps(found, indent=2)

    def setting(self) -> str:
        """Model, dtype and threads, in a few words."""
        env = self.environment
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        return f"{env['model']}, {env['dtype']}, {threads}"

    # --- baselines ---------------------------------------------------------------------

    def verdicts(self) -> dict[str, Verdict]:
        """How splitpoint compares with each baseline that was timed, over all sizes."""
        costs = self.environment["first_calls"]
        found = {}
        for name in dict.fromkeys(name for row in self.rows for name in row.baselines):
            ratios = {
                row.size: row.baselines[name].ms / row.splitpoint.ms
                for row in self.rows
                if name in row.baselines
            }
            least = min(ratios, key=lambda size: ratios[size])
            cold = costs[name]["cpu_s"] / costs["splitpoint"]["cpu_s"] if name in costs else None
            found[name] = Verdict(len(ratios), least, ratios[least], cold)
        return found

    def _verdict(self, name: str, verdict: Verdict) -> str:
        ratios = [
            row.baselines[name].ms / row.splitpoint.ms for row in self.rows if name in row.baselines
        ]
        slower = sum(ratio < 1 for ratio in ratios)
        text = (
            f"Against {name}, splitpoint is slower at {slower or 'none'} of {verdict.sizes} "
            f"size{'s' if verdict.sizes != 1 else ''}, "
            f"the least ratio {verdict.least_ratio:.2f}x at {verdict.least_at}"
        )
        if verdict.cold_ratio is None:
            return f"{text}."
        return f"{text}; compiling cold costs {verdict.cold_ratio:.1f} times splitpoint's."

    # --- kernels -----------------------------------------------------------------------

    def single(self, kernel: str) -> float:
        """How many times as long as splitpoint with ranges one kernel at all sizes takes: the
        geometric mean over the sizes."""
        logs = [math.log(row.singles[kernel].ms / row.splitpoint.ms) for row in self.rows]
        return math.exp(statistics.fmean(logs))

    @property
    def best_single(self) -> str | None:
        """The kernel with the least `single`; None where none was measured."""
        return min(self.rows[0].singles, key=self.single, default=None)

    # --- text --------------------------------------------------------------------------

    def table(self) -> list[str]:
        """Eager, torch.compile, splitpoint and the floor, a row a size, aligned."""
        heading = (
            *("size", "eager ms", "torch.compile ms", "splitpoint ms", "ratio"),
            *("floor ms", "of floor", "kernels"),
        )
        cells = [
            (
                str(row.size),
                f"{row.eager.ms:.2f}",
                f"{row.torch_compile.ms:.2f}",
                f"{row.splitpoint.ms:.2f}",
                f"{row.ratio:.2f}x",
                f"{row.floor.ms:.2f}" if row.floor else "",
                f"{row.floor_share:.0%}" if row.floor else "",
                row.variant,
            )
            for row in self.rows
        ]
        return align([heading, *cells], right=range(len(heading) - 1))

    def others(self) -> list[str]:
        """Splitpoint, its best single kernel and the baselines, each over splitpoint; [] where
        none was asked for."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.baselines))
        best = self.best_single
        if best:
            names.insert(0, f"only {best}")
        if not names:
            return []
        heading = ["size", "splitpoint ms"]
        for name in names:
            heading += [f"{name} ms", "ratio"]
        cells = []
        for row in self.rows:
            line = [str(row.size), f"{row.splitpoint.ms:.2f}"]
            for name in names:
                other = row.measured.get(name)
                line += (
                    [f"{other.ms:.2f}", f"{other.ms / row.splitpoint.ms:.2f}x"]
                    if other
                    else ["-", "-"]
                )
            cells.append(tuple(line))
        return align([tuple(heading), *cells], right=range(len(heading)))

    def costs(self) -> list[str]:
        """What each took to compile, aligned."""
        heading = ("compiled cold", "CPU s", "wall s", "over splitpoint", "graphs for")
        ours = self.environment["first_calls"]["splitpoint"]["cpu_s"]
        cells = [
            (
                name,
                f"{cost['cpu_s']:.0f}",
                f"{cost['wall_s']:.0f}",
                f"{cost['cpu_s'] / ours:.1f}x",
                self._graphs(name),
            )
            for name, cost in self.environment["first_calls"].items()
        ]
        return align([heading, *cells], right=(1, 2, 3))

    def _graphs(self, name: str) -> str:
        if name == "splitpoint":
            ranges = len(self.plan.entries)
            return f"{ranges} range" + ("s" if ranges > 1 else "")
        if name in BASELINES and BASELINES[name].per_size:
            sizes = sum(name in row.baselines for row in self.rows)
            return f"{sizes} size" + ("s" if sizes != 1 else "")
        return "all sizes"

    def _legend(self) -> list[str]:
        lines = ["ms a call, medians; ratio = torch.compile / splitpoint."]
        floors = [row.floor for row in self.rows if row.floor]
        if floors:
            read = statistics.median(floor.read_gb_s for floor in floors)
            peak = statistics.median(floor.peak_gflop_s for floor in floors)
            lines.append(
                f"floor: for each linear layer the longer of reading its weight once "
                f"({read:.1f} GB/s) and its arithmetic ({peak:.0f} GFLOP/s), the most that was "
                f"seen in this run, by probes in turn with the rest or by a pass itself; nothing "
                f"for attention. of floor: floor / splitpoint."
            )
        return lines

    def _legend_of_others(self) -> list[str]:
        lines = ["ratio = its time / splitpoint's: above 1, splitpoint is the faster."]
        best = self.best_single
        if best:
            means = ", ".join(
                f"{name} {self.single(name):.2f}x"
                for name in sorted(self.rows[0].singles, key=self.single)
            )
            lines.append(
                f"only {best}: splitpoint with one range and the one kernel that is best over all "
                f"sizes; the rest is what ranges add. Geometric mean of each single kernel over "
                f"splitpoint: {means}."
            )
        shown = {name for row in self.rows for name in row.baselines}
        lines += [f"{name}: {b.about}." for name, b in BASELINES.items() if name in shown]
        return lines + [self._verdict(name, each) for name, each in self.verdicts().items()]

    def _repeats(self) -> list[str]:
        """What was called less often than the rest, as it took too long."""
        fewer: dict[str, list[str]] = {}
        for row in self.rows:
            most = max(one.repeats for one in row.measured.values())
            for name, one in row.measured.items():
                if 0 < one.repeats < most:
                    fewer.setdefault(name, []).append(f"{row.size} ({one.repeats})")
        if not fewer:
            return []
        said = "; ".join(f"{name} at {', '.join(sizes)}" for name, sizes in fewer.items())
        budget = self.environment["budget_s"]
        return [f"Fewer repeats, as {budget:g} s is for each at a size, but 3 repeats: {said}."]

    def _noise(self) -> str:
        widest = {row.size: max(m.spread for m in row.measured.values()) for row in self.rows}
        noisy = [str(size) for size, spread in widest.items() if spread > NOISY]
        text = f"Widest interquartile spread {max(widest.values()):.0%}"
        if noisy:
            text += f"; over {NOISY:.0%} at {', '.join(noisy)}: measure these on an idle machine"
        return text + "."

    def __str__(self) -> str:
        env = self.environment
        others = self.others()
        return "\n".join(
            [
                f"{self.setting()}, {env['clock']}",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *self.table(),
                "",
                *_wrapped(self._legend()),
                *(["", *others, "", *_wrapped(self._legend_of_others())] if others else []),
                *_wrapped([*env["notes"], *self._repeats(), self._noise()]),
                "",
                *self.costs(),
            ]
        )


def variant_of(entry: PlannedRange) -> str:
    """The kernels of a range's linear layers: `packed`, or `packed 4, inductor 1` by the number
    of different layers that have each."""
    counts = Counter(entry.linear.values())
    if len(counts) < 2:
        return next(iter(counts), "inductor")
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
