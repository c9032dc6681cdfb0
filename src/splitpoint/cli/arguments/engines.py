"""The verbs about other programs that this package is used in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .shared import MODEL_HELP, Verb, integers, positive, run_arguments, verb


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
  splitpoint bench vllm smollm2 --compiled --starts 1 --json vllm.json""",
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
        "--json", type=Path, metavar="FILE", help="write environment and times as JSON"
    )
    run_arguments(parser)
