"""Run many programs, and make those that show something small."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from .compare import Report, check
from .programs import Line, Program, load, programs


@dataclass
class Finding:
    """Something that differs, and the smallest program found that shows it."""

    said: str
    program: Program
    times: int = 1


@dataclass
class Summary:
    """What came of all programs."""

    programs: int = 0
    calls: int = 0
    unstable: int = 0
    warm_starts: int = 0
    traits: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Programs by class and message of what refused them."""
    causes: dict[tuple[str, str], str] = field(default_factory=dict)
    """The traits that are left of the first program with that message, made small."""
    findings: dict[str, Finding] = field(default_factory=dict)


def batches(first_seed: int, count: int, inductor: float, size: int = 20) -> Iterator[Program]:
    """Programs that differ, which depend on the seed alone."""
    seen: set[str] = set()
    for at in itertools.count():
        for program in _batch(first_seed * 1_000_003 + at, size, inductor):
            # Hypothesis varies what it made before: another order of calls is no other program.
            body = replace(program, calls=()).text()
            if body not in seen:
                seen.add(body)
                yield program
                if len(seen) == count:
                    return


def _batch(first: int, count: int, inductor: float) -> list[Program]:
    made: list[Program] = []

    @seed(first)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(inductor))
    def collect(program: Program) -> None:
        made.append(program)

    collect()
    return made


def run(
    program: Program,
    summary: Summary,
    folder: Path | None = None,
    explain_refusals: bool = True,
) -> Report:
    """Run a program and note what came of it.

    Args:
        program: which.
        summary: is added to.
        explain_refusals: make the first program that is refused with a message small.
        folder: where the program is kept while it runs, for when the process dies of it.
    """
    if folder is not None:
        (folder / "running.py").write_text(program.text())
    try:
        report = check(load(program.text()))
    except Exception as error:  # noqa: BLE001 - a long search goes on without this program
        report = Report(finding=f"it cannot be compared: {type(error).__name__}: {error}")
    summary.programs += 1
    summary.calls += report.calls
    summary.unstable += report.unstable
    summary.warm_starts += report.warm_loads > 0
    summary.traits.update(program.traits())
    for name, message in {(name, without_details(text)) for name, text in report.refusals}:
        key = name, message
        summary.refused[key] += 1
        if explain_refusals and key not in summary.causes:
            small = smaller(program, lambda r, key=key: key in _refusals(r), 5)
            summary.causes[key] = "; ".join(small.traits())
    if report.finding:
        said = kind_of(report.finding)
        if said in summary.findings:
            summary.findings[said].times += 1
        else:
            small = smaller(program, lambda r: kind_of(r.finding) == said, 60)
            summary.findings[said] = Finding(report.finding, small)
            if folder is not None:
                path = folder / f"finding_{len(summary.findings)}.py"
                path.write_text(f"# {report.finding[:300]!r}\n{small.text()}")
    return report


def _refusals(report: Report) -> set[tuple[str, str]]:
    return {(name, without_details(text)) for name, text in report.refusals}


def kind_of(finding: str) -> str:
    """A finding without the call and the numbers, so that equal ones count as one."""
    return without_details(finding.split(": ", 1)[-1])


def without_details(message: str) -> str:
    """A message without numbers and names."""
    short = re.sub(r"\b[a-z_]*\d[\w.]*\b", "#", message.split("\n")[0])
    return re.sub(r"\[[^\]]*\]|\([^)]*\)|'[^']*'", "..", short)[:160]


def smaller(program: Program, shows: Callable[[Report], bool], seconds: float) -> Program:
    """The program without what it can lose and still show something, as far as time allows."""
    ends = time.monotonic() + seconds

    def still(candidate: Program) -> bool:
        if time.monotonic() > ends:
            return False
        try:
            return shows(check(load(candidate.text())))
        except Exception:  # noqa: BLE001 - a program that lost what it needs shows nothing
            return False

    for index in reversed(range(len(program.body))):
        body = program.body[:index] + program.body[index + 1 :]
        if still(candidate := replace(program, body=body)):
            program = candidate
    for name in reversed(list(program.arguments)[1:]):
        arguments = {key: kind for key, kind in program.arguments.items() if key != name}
        if still(candidate := replace(program, arguments=arguments)):
            program = candidate
    for option in [name for name in program.config if name not in ("max_size", "split_points")]:
        config = {key: value for key, value in program.config.items() if key != option}
        if option == "backend":
            config["backend"] = "eager"
        if config != program.config and still(candidate := replace(program, config=config)):
            program = candidate
    for count in (1, 2):
        for calls in (program.calls[:count], program.calls[-count:]):
            if len(calls) < len(program.calls) and still(replace(program, calls=calls)):
                return replace(program, calls=calls)
    for at in reversed(range(1, len(program.calls))):
        calls = program.calls[:at] + program.calls[at + 1 :]
        if still(candidate := replace(program, calls=calls)):
            program = candidate
    return program


__all__ = ["Finding", "Line", "Summary", "batches", "kind_of", "run", "smaller"]
