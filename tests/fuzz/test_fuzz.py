"""A hundred random programs at each change; `python -m tests.fuzz` for more."""

from __future__ import annotations

import pytest

from .search import Summary, batches, run

SEEDS = range(10)
PROGRAMS = 10
INDUCTOR = 0.1
"""Share that is compiled, which costs most of the time."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_do_as_eager_does(seed: int) -> None:
    summary = Summary()
    for program in batches(seed, PROGRAMS, INDUCTOR):
        run(program, summary, explain_refusals=False)
    found = [f"{each.said}\n{each.program.text()}" for each in summary.findings.values()]
    assert not found, "\n\n".join(found)
    assert summary.calls > 3 * PROGRAMS
