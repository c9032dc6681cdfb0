"""The verbs about other programs that this package is used in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .shared import (
    ENGINES,
    MODEL_HELP,
    SERVERS,
    Verb,
    integers,
    positive,
    positives,
    rates,
    run_arguments,
    some_of,
    verb,
)


def add_bench_vllm(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench vllm`."""
    parser = verb(
        verbs,
        "vllm",
        run,
        "time vLLM's engine on CPU with this package's kernels and without",
        """\
Starts vLLM's engine in fresh processes, in turn with this package's plug-in and without, and times
each further token of some requests at a time and the first token of a long prompt. With one thread
in CPU time, with more in wall time. Needs vLLM: pip install 'splitpoint[vllm]'.""",
        """\
examples:
  splitpoint bench vllm smollm2
  splitpoint bench vllm smollm2 --compiled --starts 1 --json vllm.json
  splitpoint bench vllm smollm2 --others zentorch
  splitpoint bench vllm smollm2 --check 64 --dtype fp32""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--batches",
        type=integers,
        default=(1, 4, 8),
        metavar="N,N,...",
        help="requests at a time (default: 1,4,8)",
    )
    parser.add_argument(
        "--prompt",
        type=positive,
        default=512,
        metavar="N",
        help="tokens of the prompt whose first token is timed (default: %(default)s)",
    )
    parser.add_argument(
        "--starts",
        type=positive,
        default=2,
        metavar="N",
        help="processes each way (default: %(default)s)",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="let vLLM compile the model, as it does by default; otherwise with enforce_eager",
    )
    parser.add_argument(
        "--isa",
        choices=("avx2",),
        help="measure as if the CPU had AVX2 alone, both ways",
    )
    parser.add_argument(
        "--others",
        type=some_of(ENGINES),
        default=(),
        metavar="NAME,...",
        help="'zentorch': vLLM with AMD's package too, where it is installed; it is hidden from "
        "the other processes",
    )
    _rounding(parser)
    parser.add_argument(
        "--check",
        type=positive,
        metavar="N",
        help="time nothing: compare the greedy answers to N prompts, token by token",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and times as JSON"
    )
    run_arguments(parser)


def _rounding(parser: Any) -> None:
    parser.add_argument(
        "--weights",
        choices=("int8", "int4"),
        help="what this package rounds weights of linear layers to, where it is there",
    )
    parser.add_argument(
        "--activations",
        choices=("int8",),
        help="what these layers round their input to, where that is faster; beside --weights",
    )


def add_bench_serve(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench serve`."""
    parser = verb(
        verbs,
        "serve",
        run,
        "time vLLM's server on CPU with this package and without, at rates of requests",
        """\
Starts vLLM's server on 127.0.0.1, in turn without this package's plug-in and with it, in several
rounds, sends it requests at random times, and prints times to the first token (TTFT) and for each
further one (TPOT), in wall time. The first start of each begins with empty caches, the others with
what it left. All that was started ends with the command, also when that is interrupted or killed.
Needs vLLM: pip install 'splitpoint[vllm]'.""",
        """\
examples:
  splitpoint bench serve smollm2
  splitpoint bench serve smollm2 --rates 1,4,inf --inputs 32,512 --outputs 64 --png serve.png
  splitpoint bench serve smollm2 --compiled --ranges 8,64 --json serve.json
  splitpoint bench serve smollm2 --ranges '' --ranges 8,64 --ranges 8,32,64,128 --rates inf
  splitpoint bench serve smollm2 --others transformers
  splitpoint bench serve FOLDER --tp 1,2""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--rates",
        type=rates,
        default=(1.0, 2.0, 4.0),
        metavar="N,N,...",
        help="requests a second; 'inf' sends all at once (default: 1,2,4)",
    )
    for name, default, what in (("inputs", 128, "prompt"), ("outputs", 32, "answer")):
        parser.add_argument(
            f"--{name}",
            type=positives,
            default=(default,),
            metavar="N,N,...",
            help=f"tokens of each {what}; each length is a table (default: {default})",
        )
    parser.add_argument(
        "--requests",
        type=positive,
        default=16,
        metavar="N",
        help="requests for each rate and lengths (default: %(default)s)",
    )
    parser.add_argument(
        "--tp",
        type=positives,
        default=(1,),
        metavar="N,N,...",
        help="tensor-parallel sizes; each is a table (default: 1); with more than one rank, what "
        "--ranges asks for is there with all-reduces and norms fused and not",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=2,
        metavar="N",
        help="starts of each server, in turn (default: %(default)s)",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="let vLLM compile the model, as it does by default; otherwise with enforce_eager",
    )
    parser.add_argument(
        "--ranges",
        type=integers,
        action="append",
        default=[],
        metavar="N,N,...",
        help="one more server, compiled by this package for ranges that end at these sizes; '' for "
        "one range; given several times, what each further range adds to a start is said too",
    )
    _rounding(parser)
    parser.add_argument(
        "--others",
        type=some_of(SERVERS),
        default=(),
        metavar="NAME,...",
        help="'transformers': the server of transformers too (continuous batching), without and "
        "with splitpoint.integrations.transformers; needs pip install 'transformers[serving]'",
    )
    parser.add_argument(
        "--client",
        choices=("vllm", "own"),
        help="who sends the requests: 'vllm bench serve' (default, where it can be used, without "
        "--others) or this package",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and figures as JSON"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the medians as bars")
    run_arguments(parser)
