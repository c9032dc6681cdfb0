"""`python -m tests.fuzz`: see `--help`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from .search import Summary, batches, run
from .tables import OPERATORS, RESULTS, UPDATES

HELP = f"""\
Random models, run eagerly and compiled by splitpoint, side by side. Each is a few lines out of
tests/fuzz/tables.py ({len(OPERATORS)} operators, {len(UPDATES)} updates in place, {len(RESULTS)}
forms of result), called at all sizes around the boundaries of its ranges and in four modes of
gradients, from an empty store and then from the one that this filled. Values, dtypes, shapes,
strides of views, nesting, identity, shared memory and the state afterwards must be eager's. An
error of splitpoint's own is a refusal, which is counted; anything else that differs is a finding.
"""

EPILOG = """\
examples:
  python -m tests.fuzz --programs 300 --seed 7            # about ten minutes on one core
  python -m tests.fuzz --programs 3000 --minutes 30 --inductor 0
  python -m tests.fuzz --seed 7 --folder findings         # keeps each finding as a program

A finding is printed as a program: save it at the root of the project and run it with
PYTHONPATH=src:. python finding.py. The same seed and --inductor make the same programs.
"""


def main() -> int:
    """Fuzz; 1 when something was found."""
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz",
        description=HELP,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--programs", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="which (default 0)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument(
        "--inductor",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share that Inductor compiles, which takes seconds each; in the rest, pieces run "
        "uncompiled (default 0.3)",
    )
    parser.add_argument("--folder", type=Path, help="keep findings, and the running program, here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, of what programs do
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    ends = time.monotonic() + 60 * given.minutes if given.minutes else None
    made = batches(given.seed, given.programs, given.inductor)
    with tqdm(made, total=given.programs, unit="program") as progress:
        for program in progress:
            if said := run(program, summary, given.folder).finding:
                progress.write(f"seed {given.seed}, program {summary.programs}: {said[:300]}")
            progress.set_postfix(
                calls=summary.calls,
                refused=sum(summary.refused.values()),
                findings=len(summary.findings),
            )
            if ends is not None and time.monotonic() > ends:
                break
    print(table(summary))
    return 1 if summary.findings else 0


def table(summary: Summary) -> str:
    """What came of all programs, and each finding as a program."""
    lines = [
        f"programs {summary.programs}, calls {summary.calls}, starts that loaded code "
        f"{summary.warm_starts}, unstable {summary.unstable}, findings {len(summary.findings)}",
        f"templates used: {len(summary.traits)}",
    ]
    by_class: Counter[str] = Counter()
    for (name, _), count in summary.refused.items():
        by_class[name] += count
    for name, count in by_class.most_common():
        lines.append(f"refused, {name}: {count}")
        for (other, message), times in summary.refused.most_common():
            if other == name:
                lines += [f"  {times} x {message}", f"      by {summary.causes[other, message]}"]
    for finding in summary.findings.values():
        rule = "-" * 80
        lines += [rule, f"{finding.times} x {finding.said[:500]}", rule, finding.program.text()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
