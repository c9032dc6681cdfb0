"""What servers did: as Markdown, JSON and bars."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .load import Load, Served
from .rounding import in_words

COLUMNS = {
    "mean_ttft": "Mean TTFT (ms)",
    "median_ttft": "Median TTFT (ms)",
    "mean_tpot": "Mean TPOT (ms)",
    "median_tpot": "Median TPOT (ms)",
    "throughput": "Request Throughput (req/s)",
}
"""The heads of the table, by the fields of `Served`."""


@dataclass(frozen=True)
class Start:
    """One server, from its start to its end."""

    way: str
    ranks: int
    turn: int
    """0 for the first start of a way, which found nothing kept."""
    seconds: float
    """From its start to its first answer."""
    answers: tuple[tuple[int, ...], ...]
    """Greedy answers to the same prompts, as tokens."""
    loads: tuple[Load, ...]
    served: tuple[Served, ...]
    """How each of `loads` was served."""
    said: tuple[str, ...]
    """This package's lines in its log."""
    ranges: int | None = None
    """How many ranges this package compiled its model for, where it did."""
    texts: tuple[str, ...] = ()
    """The same answers, as text."""


Group = tuple[int, int, int]
"""Ranks, tokens in, tokens out: what a table is about."""


@dataclass(frozen=True)
class ServeReport:
    """The outcome; `print` it for Markdown."""

    environment: dict[str, Any]
    starts: tuple[Start, ...]

    def ways(self, ranks: int) -> list[str]:
        """The servers of so many ranks, the one that others are compared with first."""
        return list(dict.fromkeys(start.way for start in self.starts if start.ranks == ranks))

    @property
    def groups(self) -> list[Group]:
        """What there is a table for."""
        found = ((s.ranks, each.input, each.output) for s in self.starts for each in s.loads)
        return list(dict.fromkeys(found))

    @property
    def rates(self) -> list[float]:
        """Requests a second."""
        return list(dict.fromkeys(each.qps for start in self.starts for each in start.loads))

    def median(self, way: str, group: Group, qps: float) -> Served:
        """How a load was served, as the median of the rounds, figure by figure."""
        found = [
            served
            for start in self.starts
            if start.way == way and start.ranks == group[0]
            for load, served in zip(start.loads, start.served, strict=True)
            if (load.input, load.output) == group[1:] and load.qps == qps
        ]
        return Served(
            **{name: statistics.median(getattr(each, name) for each in found) for name in COLUMNS}
        )

    def startup(self, way: str, ranks: int) -> tuple[float, float | None]:
        """Seconds of the first start, and the median of the others."""
        found = [s for s in self.starts if s.way == way and s.ranks == ranks]
        cold = next(start.seconds for start in found if start.turn == 0)
        warm = [start.seconds for start in found if start.turn > 0]
        return cold, statistics.median(warm) if warm else None

    def further_range(self, ranks: int) -> tuple[float, float | None] | None:
        """Seconds that each range beyond the fewest adds to the first start, and to the others:
        least squares over the servers with ranges; None where there are fewer than two."""
        counts = {s.way: s.ranges for s in self.starts if s.ranges is not None}
        if len(counts) < 2:
            return None
        cold, warm = [], []
        for way, count in counts.items():
            first, others = self.startup(way, ranks)
            cold.append((count, first))
            if others is not None:
                warm.append((count, others))
        return _slope(cold), _slope(warm) if warm else None

    def agreement(self, way: str, ranks: int) -> str:
        """Where the first start's greedy answers leave those of the first way or, where servers do
        not tell tokens, how many are the text of the first such way's."""
        firsts = {s.way: s for s in reversed(self.starts) if s.ranks == ranks}
        own, other = firsts[self.ways(ranks)[0]], firsts[way]
        if not all(other.answers):
            own = next(firsts[each] for each in self.ways(ranks) if not all(firsts[each].answers))
            if own is other or not other.texts:
                return "not compared: the server does not tell tokens"
            same = sum(a == b for a, b in zip(own.texts, other.texts, strict=True))
            return f"{same} of {len(own.texts)} equal to those of {own.way}, as text"
        pairs = list(zip(own.answers, other.answers, strict=True))
        differ = [
            next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
            for pair in pairs
            if pair[0] != pair[1]
        ]
        if not differ:
            return f"{len(pairs)} of {len(pairs)} equal, {len(pairs[0][0])} tokens each"
        return f"{len(pairs) - len(differ)} of {len(pairs)} equal; first to differ: token " + str(
            1 + min(differ)
        )

    def to_json(self) -> str:
        """`{"environment": {...}, "starts": [...]}`, with the loads of each start as rows."""
        starts = []
        for start in self.starts:
            row = asdict(start)
            del row["served"]
            row["loads"] = [
                {**asdict(load), "qps": load.qps if load.qps < float("inf") else "inf"}
                | asdict(served)
                for load, served in zip(start.loads, start.served, strict=True)
            ]
            starts.append(row)
        return json.dumps({"environment": self.environment, "starts": starts}, indent=2)

    def __str__(self) -> str:
        env = self.environment
        rounding = f"; {in_words(env['rounding'])}" if env["rounding"] else ""
        rounds = 1 + max(start.turn for start in self.starts)
        lines = [
            f"{env['model']}, {env['dtype']}{rounding}, {env['threads']} threads a rank, "
            f"{env['mode']}; "
            f"{env['requests']} requests a row, medians of {rounds} rounds, sent by "
            f"{'vllm bench serve' if env['client'] == 'vllm' else 'splitpoint'}",
            f"vLLM {env['vllm']}, torch {env['torch']} on {env['cpu']}, {env['cores']} cores",
        ]
        for group in self.groups:
            ranks, length, answer = group
            lines += [
                "",
                f"{length} tokens in, {answer} out, tensor parallel {ranks}; "
                "over 1 is better than vLLM's:",
                "",
                *self._table(group),
            ]
        lines += ["", *self._starts()]
        said = dict.fromkeys(f"{s.way}: {line}" for s in self.starts for line in s.said)
        return "\n".join([*lines, *(f"\n{line}" for line in said)])

    def _table(self, group: Group) -> list[str]:
        rows = [_row("QPS", "Server", *COLUMNS.values()), _row(*["---"] * (2 + len(COLUMNS)))]
        for qps in self.rates:
            first, *_ = ways = self.ways(group[0])
            base = self.median(first, group, qps)
            for way in ways:
                made = self.median(way, group, qps)
                cells = [f"{getattr(made, name):.{_digits(name)}f}" for name in COLUMNS]
                rows.append(_row(f"{qps:g}", way, *cells))
                if way != first:
                    rows.append(_row("", "ratio", *(_ratio(base, made, name) for name in COLUMNS)))
        return rows

    def _starts(self) -> list[str]:
        rows = [
            _row("Server", "TP", "Cold start (s)", "Warm start (s)", "Greedy answers"),
            _row(*["---"] * 5),
        ]
        for ranks in dict.fromkeys(start.ranks for start in self.starts):
            for number, way in enumerate(self.ways(ranks)):
                cold, warm = self.startup(way, ranks)
                rows.append(
                    _row(
                        way,
                        str(ranks),
                        f"{cold:.1f}",
                        f"{warm:.1f}" if warm is not None else "",
                        self.agreement(way, ranks) if number else "",
                    )
                )
            if (each := self.further_range(ranks)) is not None:
                cells = [f"{seconds:+.2f}" if seconds is not None else "" for seconds in each]
                rows.append(_row("each further range", str(ranks), *cells, ""))
        return rows


def ratio(base: Served, made: Served, name: str) -> float:
    """How much better a figure is than another server's: over 1 for shorter times."""
    own, other = getattr(base, name), getattr(made, name)
    return float(other / own if name == "throughput" else own / other)


def _ratio(base: Served, made: Served, name: str) -> str:
    """In words; none of a figure that is printed as 0, as times between tokens are where a server
    sends several in one piece."""
    least = 0.5 * 10 ** -_digits(name)
    if min(getattr(base, name), getattr(made, name)) < least:
        return ""
    return f"{ratio(base, made, name):.2f}x"


def save_picture(report: ServeReport, path: Path) -> None:
    """Write the medians of times as bars, a picture's columns being the rates; one more file for
    each further pair of lengths or tensor-parallel size, with a number before the suffix.

    Raises:
        UsageError: when matplotlib is not installed.
    """
    from .picture import plots

    plots()
    from ..report.bars import Panel, save_bars

    env = report.environment
    for number, group in enumerate(report.groups):
        panels = [
            Panel(
                COLUMNS[name],
                {
                    w: [getattr(report.median(w, group, q), name) for q in report.rates]
                    for w in report.ways(group[0])
                },
            )
            for name in ("median_ttft", "median_tpot")
        ]
        to = path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}")
        save_bars(
            to,
            [f"{qps:g} QPS" for qps in report.rates],
            panels,
            title=f"vLLM's server: {env['model']}, {env['dtype']}, {group[1]} tokens in, "
            f"{group[2]} out, tensor parallel {group[0]}",
        )


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line with the least squares."""
    x = statistics.mean(x for x, _ in points)
    return sum((a - x) * b for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def _digits(name: str) -> int:
    return 3 if name == "throughput" else 1


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
