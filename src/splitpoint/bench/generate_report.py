"""What `splitpoint bench generate` measured: rows, table, JSON, picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..ranges import align
from .forward_report import WIDTH, Measured
from .picture import plots


@dataclass(frozen=True)
class Divergence:
    """Where greedy tokens first differ from eager's, in some rows of a batch."""

    after: int
    """New tokens that were the same in all rows."""
    gap: float
    """How much likelier eager's token is where a row differs first, by its own logits, in
    deviations of them; of the row where it is most."""


@dataclass(frozen=True)
class GenerateRow:
    """One way to generate, for one batch of prompts."""

    name: str
    prompt: int
    batch: int
    first: Measured
    """Until the first token of all rows."""
    step: Measured
    """For each further token of all rows."""
    warm_up_s: float
    """Of the first run, in which some of them compile."""
    divergence: Divergence | None
    """None where all tokens are eager's."""
    floor_ms: float | None
    """The least that a step can take; None where memory could not be read."""

    @property
    def tokens_per_s(self) -> float:
        """Of all rows, after the first."""
        return self.batch / self.step.ms * 1e3

    @property
    def floor_share(self) -> float | None:
        """The share of the floor that a step reaches: 1.0 is the floor itself."""
        return None if self.floor_ms is None else self.floor_ms / self.step.ms


@dataclass(frozen=True)
class GenerateReport:
    """The outcome; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[GenerateRow, ...]

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`."""
        rows = [
            asdict(row) | {"tokens_per_s": row.tokens_per_s, "floor_share": row.floor_share}
            for row in self.rows
        ]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=2)

    def setting(self) -> str:
        """Model, dtype and threads, in a few words."""
        env = self.environment
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        return f"{env['model']}, {env['dtype']}, {threads}"

    def table(self) -> list[str]:
        """A row for each way and batch of prompts, aligned."""
        heading = (
            *("prompt", "batch", "", "first ms", "spread", "ms a token", "spread"),
            *("tokens/s", "of floor", "as eager", "warm-up s"),
        )
        cells = [
            (
                str(row.prompt),
                str(row.batch),
                row.name,
                f"{row.first.ms:.0f}",
                f"{row.first.spread:.0%}",
                f"{row.step.ms:.2f}",
                f"{row.step.spread:.0%}",
                f"{row.tokens_per_s:.1f}",
                "" if row.floor_share is None else f"{row.floor_share:.0%}",
                self._same(row),
                f"{row.warm_up_s:.1f}",
            )
            for row in self.rows
        ]
        return align([heading, *cells], right={0, 1, 3, 4, 5, 6, 7, 8, 9, 10})

    def _same(self, row: GenerateRow) -> str:
        if row.divergence is None:
            return "all"
        return f"{row.divergence.after} ({row.divergence.gap:.1g})"

    def __str__(self) -> str:
        env = self.environment
        lines = [
            f"{name}: {about}; prepared in {env['prepare_s'][name]:.1f} s."
            for name, about in env["about"].items()
        ]
        lines.append(
            "ms a token: of a step, which gives one to each row of the batch. Medians of rounds in "
            "turn; warm-up: the first run, where some compile. Neither it nor preparing is in them."
        )
        if env["read_gb_s"] is not None:
            lines.append(
                f"of floor: what reading the weights of body and head, and half of the new keys "
                f"and values with all of the prompt's, once from memory would take "
                f"({env['read_gb_s']:.1f} GB/s, the best of reads in turn), over ms a token."
            )
        lines.append(
            "as eager: greedy tokens that are the same at first, and how much likelier eager's "
            "next one is, in deviations of the logits there."
        )
        lines += env["notes"]
        return "\n".join(
            [
                f"{self.setting()}, {env['clock']}: {env['new_tokens']} new tokens, "
                f"{env['rounds']} rounds",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *self.table(),
                "",
                *_wrapped(lines),
            ]
        )

    def save_picture(self, path: Path) -> None:
        """Write bars of both times as PNG.

        Raises:
            UsageError: when matplotlib is not installed.
        """
        cells = list(dict.fromkeys((row.prompt, row.batch) for row in self.rows))
        names = list(dict.fromkeys(row.name for row in self.rows))
        found = {(row.name, row.prompt, row.batch): row for row in self.rows}
        floors = [next(r.floor_ms for r in self.rows if (r.prompt, r.batch) == c) for c in cells]
        plots()  # says what is missing
        from ..report.bars import Panel, save_bars

        groups = [f"{batch} x {prompt} tokens" for prompt, batch in cells]
        first = {name: [_ms(found.get((name, *c)), "first") for c in cells] for name in names}
        step = {name: [_ms(found.get((name, *c)), "step") for c in cells] for name in names}
        save_bars(
            path,
            groups,
            [Panel("the first token", first), Panel("each further token", step, floors)],
            title=f"Generating with {self.setting()}: speed, the slowest being 1 "
            f"(milliseconds above the bars)",
        )


def _ms(row: GenerateRow | None, what: str) -> float | None:
    measured: Measured | None = getattr(row, what, None)
    return None if measured is None else measured.ms


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
