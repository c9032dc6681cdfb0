"""The arguments of `splitpoint bench tuner`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .shared import (
    MODEL_HELP,
    Verb,
    config_arguments,
    layers_argument,
    positive,
    run_arguments,
    seconds,
    two_or_more,
    verb,
)


def add_bench_tuner(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench tuner`."""
    parser = verb(
        verbs,
        "tuner",
        run,
        "whether kernels chosen under load are as good as any, and compute the same",
        """\
Compiles the model several times from empty caches while other processes read memory and compute on
the same cores. Then, without load, times every range of each of these against the others, against
Inductor's own layers and against each kernel at all layers, in turns, at the ends and the hint of
the range. Prints how far each is behind the best of its alternatives, and the largest difference
between the runs' logits.""",
        """\
examples:
  splitpoint bench tuner smollm2 --layers 2
  splitpoint bench tuner smollm2 --runs 5 --load 2 --dtype fp32 --json tuner.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--runs",
        type=two_or_more,
        default=3,
        metavar="N",
        help="how often it is compiled under load (default: %(default)s)",
    )
    parser.add_argument(
        "--load",
        type=positive,
        default=1,
        metavar="N",
        help="processes that load the machine meanwhile (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=1.0,
        metavar="S",
        help="time given to each way at each size, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)
