"""`splitpoint bench collective`: its rows as Markdown, JSON and curves."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..collectives.launch import run_ranks
from ..collectives.policy import QUANTS, Algorithm, Key, Policy, Quant, seed_policy
from ..collectives.reference import FP4_BLOCK
from ..errors import UsageError
from ..report.environment import environment
from . import collective, vllm_shm
from .collective import (
    BASELINES,
    FLOORS,
    FUSED,
    IN_PLACE,
    MOVED,
    MOVED_UNFUSED,
    NATIVE,
    ONE_SHOT,
    STANDARD,
    TWO_SHOT,
    UNFUSED,
    VLLM,
    Row,
    Setting,
)
from .picture import plots

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Group = tuple[int, int, torch.dtype, bool, str]
"""What a setting is but for its tokens."""

TIMEOUT_S = 120.0

VARIANTS: dict[str, Algorithm] = {
    STANDARD: "standard",
    NATIVE: "native",
    ONE_SHOT: "one_shot",
    TWO_SHOT: "two_shot",
}
"""Algorithms of a policy by the names that variants have here; others are not in a policy."""

QUANT: dict[str, Quant] = {quant: quant for quant in QUANTS}

NEAR = 0.05
"""A choice that takes so much longer than the best, relatively, is as good."""


@dataclass(frozen=True)
class Choice:
    """The policy's choice for a setting, beside what was measured."""

    algorithm: Algorithm
    behind: float
    """How much longer it takes than the best variant, relatively, each in its fastest form
    (functional or in place); the median over the starts of the processes. NaN where the choice
    was not measured."""
    error: float
    """Of `behind`: half its range over the starts of the processes, or where there was one, the
    standard error that the two times have by their bursts."""

    def __str__(self) -> str:
        if math.isnan(self.behind):
            return "not measured"
        return f"{100 * self.behind:.1f} ± {100 * self.error:.1f} %"


@dataclass(frozen=True)
class CollectiveReport:
    """What each variant took in each setting; `print` it for Markdown."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    policy: Policy
    """Whose choices are compared with the best."""

    @property
    def settings(self) -> list[Setting]:
        """The settings, in the order in which they were measured."""
        return list(dict.fromkeys(row.setting for row in self.rows))

    @property
    def groups(self) -> list[Group]:
        """The settings but for their tokens."""
        return list(dict.fromkeys(_group(setting) for setting in self.settings))

    def times(self, setting: Setting) -> dict[str, float]:
        """Seconds a call, by variant."""
        return {row.variant: row.median_s for row in self.rows if row.setting == setting}

    def choice(self, setting: Setting) -> Choice:
        """What the policy chooses for a setting, and how far that is behind the best."""
        rows = [row for row in self.rows if row.setting == setting and row.variant not in FLOORS]
        algorithm = self.policy.choose(key_of(setting), setting.bytes)[0]
        name = next(name for name, a in VARIANTS.items() if a == algorithm)
        names = (name, name + IN_PLACE)
        if not any(row.variant in names for row in rows):
            return Choice(algorithm, math.nan, math.nan)
        # Each start of the processes is compared in itself.
        starts = [
            min(time for variant, time in times.items() if variant in names) / min(times.values())
            for start in range(max(1, *(len(row.starts_s) for row in rows)))
            for times in [
                {r.variant: r.starts_s[start] if r.starts_s else r.median_s for r in rows}
            ]
        ]
        if len(starts) > 1:
            error = (max(starts) - min(starts)) / 2
        else:
            best = min(rows, key=lambda row: row.median_s)
            own = min((r for r in rows if r.variant in names), key=lambda row: row.median_s)
            error = 0.0 if best is own else math.hypot(best.error, own.error)
        return Choice(algorithm, statistics.median(starts) - 1, error)

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...], "choices": [...]}`, times in milliseconds."""
        rows = [
            _named(row.setting)
            | {
                "variant": row.variant,
                "ms": row.median_s * 1e3,
                "spread": row.spread,
                "bursts": row.bursts,
                "calls": row.calls,
                "starts_ms": [1e3 * each for each in row.starts_s],
                "speedup": over / row.median_s if over is not None else None,
            }
            for row in self.rows
            for over in [self.times(row.setting).get(STANDARD)]
        ]
        choices = [
            _named(setting)
            | {k: None if v != v else v for k, v in asdict(self.choice(setting)).items()}
            for setting in self.settings
        ]
        return json.dumps(
            {"environment": self.environment, "rows": rows, "choices": choices}, indent=2
        )

    def __str__(self) -> str:
        env = self.environment
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        lines = [
            f"All-reduce, residual add and RMSNorm, {threads} a rank, on {env['cores']} cores.",
            f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']}).",
            "",
        ]
        for setting in self.settings:
            lines += [*_configuration(setting, self.times(setting)), ""]
        lines += ["### Fused against the rest", "", *_summary(self), "", _distance(self), ""]
        if env.get("vllm"):
            lines += [f"Without vLLM: {env['vllm']}.", ""]
        lines += [
            "Medians of what the slowest rank took, variants in turns, inputs in the caches; every",
            "variant was compared with float64 first. Standard and Native Compiled reduce by gloo.",
            "In place, the norm overwrites the input and the sum the residual. Data movement, with",
            "no result to compare: the same buffers read and written in place, without the norm's",
            "arithmetic. Of floor: how near the fastest is to that, one-shot; data alone: how many",
            "times as long that takes unfused. Policy: which algorithm it chooses; behind best:",
            "how much longer that takes than the fastest, with",
            _error_text(env.get("starts", 1)),
        ]
        return "\n".join(lines)


def run(
    *,
    ranks: Sequence[int],
    hidden: Sequence[int],
    tokens: Sequence[int],
    dtype: torch.dtype,
    residual: Sequence[bool],
    quants: Sequence[str],
    threads: int,
    budget_s: float,
    say: Callable[[str], None],
    policy: Policy | None = None,
    baselines: Collection[str] = tuple(BASELINES),
    starts: int = 1,
) -> CollectiveReport:
    """Start as many processes as each of `ranks` says, one after the other and each so many
    times, and measure there. Compare with `baselines` (see `BASELINES`), and with what `policy`,
    completed by the seeds, would choose.

    Raises:
        UsageError: when nvfp4 has no blocks of a hidden size.
        OutputMismatch: when a variant is wrong.
        WorkspaceError: when shared memory cannot be used here.
        RankFailed: when a process dies.
    """
    if "nvfp4" in quants and (odd := [width for width in hidden if width % FP4_BLOCK]):
        raise UsageError(
            f"nvfp4 has blocks of {FP4_BLOCK} columns, which {odd[0]} is no multiple of: leave one "
            f"of them out"
        )
    rows: list[Row] = []
    for count in ranks:
        say(f"{count} ranks ...")
        settings = [
            Setting(count, width, size, dtype, with_residual, quant)
            for with_residual, quant, width, size in itertools.product(
                residual, quants, hidden, tokens
            )
        ]
        measured = [
            collective.same_on_all(
                run_ranks(
                    count, threads, collective.measure, settings, baselines, budget_s, TIMEOUT_S
                )
            )
            for _ in range(starts)
        ]
        rows += collective.over_starts(measured)
    return CollectiveReport(
        environment()
        | {
            "threads": threads,
            "budget_s": budget_s,
            "eps": collective.EPS,
            "starts": starts,
            "vllm": vllm_shm.unavailable() if "vllm" in baselines else None,
        },
        tuple(rows),
        (policy or Policy()).over(seed_policy()),
    )


def save_pictures(report: CollectiveReport, path: Path) -> list[Path]:
    """Write time against tokens as PNG, one picture for each group of settings; returns where.

    Raises:
        UsageError: when matplotlib is not installed.
    """
    written = []
    for group in report.groups:
        ranks, hidden, dtype, residual, quant = group
        settings = [each for each in report.settings if _group(each) == group]
        times = [report.times(each) for each in settings]
        curves = {
            "gloo, then norm": (STANDARD,),
            "shm, then norm": UNFUSED,
            "one-shot": (ONE_SHOT,),
            "two-shot": (TWO_SHOT,),
            "in place": _IN_PLACE,
        }
        series = {
            name: [
                1e3 * (each[variants[0]] if len(variants) == 1 else min(_those(each, variants)))
                for each in times
            ]
            for name, variants in curves.items()
            if any(_those(times[0], variants))
        }
        name = str(dtype).removeprefix("torch.")
        target = path
        if len(report.groups) > 1:
            kept = "residual" if residual else "plain"
            target = path.with_stem(f"{path.stem}-{ranks}x{hidden}-{name}-{kept}-{quant}")
        plots().save_curves(
            target,
            [each.tokens for each in settings],
            series,
            None,
            title=f"All-reduce + RMSNorm: {ranks} ranks, hidden {hidden}, {name}, "
            f"{'with' if residual else 'no'} residual" + _quantised(quant),
        )
        written.append(target)
    return written


_IN_PLACE = tuple(name for name in FUSED if name.endswith(IN_PLACE))


def key_of(setting: Setting) -> Key:
    """What a policy knows a setting by, besides its bytes."""
    return Key(
        "cpu",
        setting.ranks,
        str(setting.dtype).removeprefix("torch."),
        setting.residual,
        QUANT[setting.quant],
        setting.hidden,
    )


def _named(setting: Setting) -> dict[str, Any]:
    return {
        "ranks": setting.ranks,
        "hidden": setting.hidden,
        "tokens": setting.tokens,
        "bytes": setting.bytes,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "residual": setting.residual,
        "quant": setting.quant,
    }


def _group(setting: Setting) -> Group:
    return (setting.ranks, setting.hidden, setting.dtype, setting.residual, setting.quant)


def _those(times: dict[str, float], names: Sequence[str]) -> list[float]:
    """The times of variants by the start of their names."""
    return [time for variant, time in times.items() if variant.startswith(tuple(names))]


def _quantised(quant: str) -> str:
    return "" if quant == "none" else f", {quant}"


def _configuration(setting: Setting, times: dict[str, float]) -> list[str]:
    dtype = str(setting.dtype).removeprefix("torch.")
    cells = [("Operation", "Time (ms)", "Speedup")]
    for variant, seconds in times.items():
        speedup = "baseline" if variant == STANDARD else _over(times.get(STANDARD), seconds, 2)
        cells.append((variant, f"{seconds * 1e3:.4f}", speedup))
    return [
        f"### Configuration: seq_len={setting.tokens}, dtype={dtype}, "
        f"{'with' if setting.residual else 'no'} residual" + _quantised(setting.quant),
        "",
        f"hidden {setting.hidden}, {setting.ranks} ranks, {_bytes(setting.bytes)} a rank",
        "",
        *_markdown(cells, right={1, 2}),
    ]


def _summary(report: CollectiveReport) -> list[str]:
    cells = [
        (
            "Ranks",
            "Hidden",
            "seq_len",
            "Input",
            "Residual",
            "Quantisation",
            "Fastest fused",
            "Time (ms)",
            "over Standard",
            "over unfused shm",
            "over vLLM",
            "data alone",
            "of floor",
            "Policy",
            "behind best",
        )
    ]
    for setting in report.settings:
        times = report.times(setting)
        best = min((name for name in FUSED if name in times), key=times.__getitem__)
        choice = report.choice(setting)
        cells.append(
            (
                str(setting.ranks),
                str(setting.hidden),
                str(setting.tokens),
                _bytes(setting.bytes),
                "yes" if setting.residual else "no",
                setting.quant,
                best.removeprefix("Fused "),
                f"{times[best] * 1e3:.4f}",
                _over(times.get(STANDARD), times[best], 1),
                _over(min(_those(times, UNFUSED), default=None), times[best], 2),
                _over(times.get(VLLM + IN_PLACE), times[best], 2),
                *_of_floor(times, times[best]),
                choice.algorithm,
                str(choice),
            )
        )
    return _markdown(cells, right={0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 14})


def _of_floor(times: dict[str, float], best: float) -> tuple[str, str]:
    """What fusing makes of moving the data alone, and how near the best is to the floor."""
    if MOVED not in times:
        return "-", "-"
    unfused = min(_those(times, MOVED_UNFUSED), default=None)
    return _over(unfused, times[MOVED], 2), f"{100 * times[MOVED] / best:.0f} %"


def _distance(report: CollectiveReport) -> str:
    """In how many settings the policy's choice is as good as the best, and where it is worst."""
    choices = {setting: report.choice(setting) for setting in report.settings}
    choices = {setting: each for setting, each in choices.items() if not math.isnan(each.behind)}
    if not choices:
        return "The policy's choices were not measured."
    near = sum(each.behind <= NEAR for each in choices.values())
    worst = max(choices, key=lambda setting: choices[setting].behind)
    return (
        f"The policy's choice is within {100 * NEAR:.0f} % of the best variant in {near} of "
        f"{len(choices)} configurations; at worst {choices[worst]} behind, at "
        f"{worst.tokens} x {worst.hidden}, {worst.ranks} ranks" + _quantised(worst.quant) + "."
    )


def _over(baseline: float | None, seconds: float, digits: int) -> str:
    """How many times as long a baseline takes, where it was measured."""
    return "-" if baseline is None else f"{baseline / seconds:.{digits}f}x"


def _error_text(starts: int) -> str:
    if starts > 1:
        return f"half the range over {starts} starts of the processes, each compared in itself."
    return "the standard error that the two medians have."


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:g} KiB" if count < 1 << 20 else f"{count / (1 << 20):g} MiB"


def _markdown(rows: Sequence[tuple[str, ...]], right: set[int]) -> list[str]:
    """A Markdown table whose source is aligned as well."""
    columns = range(len(rows[0]))
    widths = [max(3, *(len(row[c]) for row in rows)) for c in columns]
    rule = ["-" * (widths[c] - 1) + (":" if c in right else "-") for c in columns]
    lines = [
        [row[c].rjust(widths[c]) if c in right else row[c].ljust(widths[c]) for c in columns]
        for row in rows
    ]
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]
