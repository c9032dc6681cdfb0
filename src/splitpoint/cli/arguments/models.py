"""Verbs that take a model and use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .shared import (
    MODEL_HELP,
    PROMPT,
    Verb,
    config_arguments,
    layers_argument,
    policy_argument,
    positive,
    run_arguments,
    store_argument,
    verb,
)


def add_demo(verbs: Any, run: Verb) -> None:
    """Add `splitpoint demo`."""
    parser = verb(
        verbs,
        "demo",
        run,
        "compile SmolLM2-135M, let it answer, and time it beside eager and torch.compile",
        """\
Loads SmolLM2-135M-Instruct (converted once, about 0.5 GB in the cache folder), compiles it for
ranges (or loads what the store has), and lets it answer a prompt over a paged KV cache, with tokens
a second beside transformers alone. Prints the plan, then times a forward pass against eager and
torch.compile(dynamic=True), each checked first, and writes both as PNG. Takes three minutes at
most: of the comparison, which has two of them at most, the largest sizes and torch.compile are
left out where they do not fit, and the report says so.""",
        """\
examples:
  splitpoint demo
  splitpoint demo --dtype fp32 --split-points 16,128 --png curve.png""",
    )
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--png",
        type=Path,
        default=Path("splitpoint-demo.png"),
        metavar="FILE",
        help="where the picture goes (default: %(default)s)",
    )
    run_arguments(parser)
    config_arguments(parser, weights=False)


def add_plan(verbs: Any, run: Verb) -> None:
    """Add `splitpoint plan`."""
    parser = verb(
        verbs,
        "plan",
        run,
        "show what would be compiled for a model, without compiling or reading weights",
        """\
Prints the model's shape and the plan: the ranges of sizes, in order, each with the size its
compiler tunes for and the passes that run for it. A range of one size is compiled with that
size as a constant. Compiling may split ranges further, where the model itself demands it.""",
        """\
examples:
  splitpoint plan smollm2 --max-size 8192 --split-points 8,64,512 --compile-sizes 1,2
  splitpoint plan ./my-model --config vllm-compilation-config.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP + "; or a config.json file")
    layers_argument(parser)
    config_arguments(parser)


def add_run(verbs: Any, run: Verb) -> None:
    """Add `splitpoint run`."""
    parser = verb(
        verbs,
        "run",
        run,
        "let a model answer, split over processes that are the ranks of a tensor-parallel group",
        """\
Splits a model of the Llama family over N processes of this host (heads that do not divide are
filled up with heads of zeros), compiles it for ranges, fuses all-reduce + RMSNorm where the
policy says so, and answers a prompt. Each rank keeps the keys and values of its heads in a paged
cache, and the prompt goes in parts of at most --max-size. Prints the answer, the plan with what
serves the collectives of each range and why, and how many all-reduces were fused.
torchrun may start the ranks as well.""",
        """\
examples:
  splitpoint run smollm2 --tp 2
  splitpoint run smollm2 --tp 2 --collectives gloo --tokens 8
  torchrun --nproc-per-node 2 -m splitpoint run smollm2 --policy policy.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tp",
        type=positive,
        metavar="N",
        help="ranks to start (default: 1; under torchrun as many as it started)",
    )
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=16,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--collectives",
        choices=("auto", "shm", "gloo"),
        default="auto",
        help="what serves them: shared memory, gloo, or the first that can (default: %(default)s)",
    )
    policy_argument(parser)
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)


def add_compile(verbs: Any, run: Verb) -> None:
    """Add `splitpoint compile`."""
    parser = verb(
        verbs,
        "compile",
        run,
        "fill the store for a model, so that it starts at once elsewhere",
        """\
Captures and compiles a model and keeps what comes out in the store. No weights are read:
they are drawn, for code does not depend on them. The model, the flags and the machine must be
those that it will run with; 'splitpoint cache why-miss' tells what differs.""",
        """\
examples:
  splitpoint compile smollm2 --cache-dir ./store
  splitpoint compile ./my-model --dtype bf16 --max-size 2048 --split-points 8,64""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    store_argument(parser)
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)


def add_env(verbs: Any, run: Verb) -> None:
    """Add `splitpoint env`."""
    parser = verb(
        verbs,
        "env",
        run,
        "print versions, machine, store and what of torch is leant on: for bug reports",
        """\
Prints what a bug report needs: versions, CPU and instruction sets, C++ compiler, kernel library,
store, and the table of the private names of torch that are used: what each is for, whether this
version of torch has it, and what happens where it has not. Builds and changes nothing.""",
        """\
examples:
  splitpoint env
  splitpoint env --names > environment.txt""",
    )
    store_argument(parser)
    parser.add_argument("--names", action="store_true", help="list every private name by itself")
