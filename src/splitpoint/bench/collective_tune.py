"""`splitpoint tune collective`: a policy from measurements on this machine, or from a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..collectives.measured import Contradiction, Measurement, build, contradictions
from ..collectives.policy import ALGORITHMS, Policy
from ..collectives.tables import read_table, table_json
from ..ranges import align
from .collective_report import VARIANTS, CollectiveReport, key_of


@dataclass(frozen=True)
class Tuned:
    """A policy, with what it was built from."""

    rows: tuple[Measurement, ...]
    source: str
    policy: Policy
    contradictions: tuple[Contradiction, ...]

    def to_table(self) -> str:
        """The measurements as a table that `--table` reads."""
        return table_json(self.rows, self.source)

    def check(self) -> tuple[int, float]:
        """How many measurements the policy gives their fastest algorithm (ties count), and the
        most that its choice takes over the fastest, as a ratio."""
        chosen = [(row, self.policy.choose(row.key, row.nbytes)[0]) for row in self.rows]
        right = sum(algorithm in row.fastest() for row, algorithm in chosen)
        return right, max(row.slowdown(algorithm) for row, algorithm in chosen)

    def __str__(self) -> str:
        right, worst = self.check()
        rows = [("configuration", "bytes", *ALGORITHMS, "chosen")]
        for row in self.rows:
            times = dict(row.seconds)
            cells = [f"{1e6 * times[a]:.1f}" if a in times else "" for a in ALGORITHMS]
            chosen = self.policy.choose(row.key, row.nbytes)[0]
            rows.append((str(row.key), str(row.nbytes), *cells, chosen))
        lines = [f"Microseconds. {self.source}.", ""]
        lines += [*align(rows, right={1, 2, 3, 4, 5}), "", str(self.policy), ""]
        lines.append(
            f"{right} of {len(self.rows)} measurements get their fastest algorithm back (ties "
            f"within 3 % count as either); the choice is at most {100 * (worst - 1):.1f} % slower."
        )
        if self.contradictions:
            lines += ["", "One byte threshold for all hidden sizes would be wrong here:"]
            lines += [f"- {each}" for each in self.contradictions]
        return "\n".join(lines)


def from_report(report: CollectiveReport) -> Tuned:
    """The policy of what `bench collective` measured; it verified each variant first, and each
    time is that of the slowest rank, so that all ranks come to the same policy."""
    rows = []
    for setting in report.settings:
        times = report.times(setting)
        given = {a: times[name] for name, a in VARIANTS.items() if name in times}
        seconds = tuple((a, given[a]) for a in ALGORITHMS if a in given)
        rows.append(Measurement(key_of(setting), setting.bytes, seconds))
    env = report.environment
    return _tuned(
        rows,
        f"Measured on {env['cpu']}, {env['cores']} cores, {env['threads']} threads a rank, "
        f"torch {env['torch']}",
    )


def from_table(path: Path) -> Tuned:
    """The policy of a table of measurements, such as `Tuned.to_table` writes.

    Raises:
        InvalidPolicy: when the file is none.
    """
    return _tuned(*read_table(path))


def _tuned(rows: Sequence[Measurement], source: str) -> Tuned:
    return Tuned(tuple(rows), source, build(rows, source), tuple(contradictions(rows)))
