"""Verbs that generate text, and time it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .shared import (
    GENERATORS,
    MODEL_HELP,
    Verb,
    above_zero,
    config_arguments,
    layers_argument,
    natural,
    positive,
    positives,
    run_arguments,
    some_of,
    two_or_more,
    verb,
)

WEIGHTS = ("none", "int8", "int4")
ACTIVATIONS = ("none", "int8")


def add_generate(verbs: Any, run: Verb) -> None:
    """Add `splitpoint generate`."""
    parser = verb(
        verbs,
        "generate",
        run,
        "let a model answer a prompt, compiled over a paged KV cache",
        """\
Loads a model, compiles it in place (splitpoint.integrations.transformers; what the store has is
loaded), and lets transformers' generate go on from the prompt, in the model's chat template where
it has one. The answer goes to standard output as it comes, and nothing else does. What is done,
and at the end the time to the first token, tokens a second after it, and how much was compiled or
loaded, go to standard error. Tokens are the likeliest ones unless --sample or --temperature is
given. Compiling is not part of the times.""",
        """\
examples:
  splitpoint generate smollm2 "Why is the sky blue?"
  splitpoint generate smollm2 "Once upon a time" --raw --sample --seed 7 --max-new-tokens 200
  splitpoint generate ./my-model "Why?" --dtype fp32 --threads 2 --json answer.json""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="what to ask")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="go on from the prompt itself, without chat template"
    )
    parser.add_argument("--sample", action="store_true", help="draw tokens by their probabilities")
    parser.add_argument(
        "--temperature",
        type=above_zero,
        metavar="T",
        help="divide logits by this before drawing; asks for --sample (default: 1.0)",
    )
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="of what is drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write text, figures and environment as JSON"
    )
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)


def add_bench_generate(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench generate`."""
    parser = verb(
        verbs,
        "generate",
        run,
        "time to the first token and of each further one: transformers, others, splitpoint",
        """\
Lets several ways generate greedily from the same random prompts, in one batch, and times them in
turn: the time until all rows have their first token, and of each step after it. Prints medians in
milliseconds of wall time, and writes nothing of the end token: all make as many tokens.
  eager     transformers with its default, a DynamicCache
  static    transformers with a StaticCache and its compiled step; compiles for each batch of
            prompts anew, which takes a minute each for a small model
  llamacpp  llama.cpp over the same weights, written as GGUF into the cache folder (models of the
            Llama family); pip install llama-cpp-python
  llamacpp-q8_0, llamacpp-q4_0
            the same with weights in its 8 and 4 bits, beside --weights of ours; they have no floor,
            and their tokens may be any
  openvino  OpenVINO GenAI over the same file, which must have a tokenizer: smollm2 alone;
            pip install openvino-genai
  ours      transformers' generate over the paged cache: splitpoint.integrations.transformers
What is not installed is left out, and the report says so. Tokens are compared with eager's first,
in the same dtype: 'as eager' says how many are the same, and how much likelier eager's next one
is, in deviations of the logits there. In fp32 there may be none, but for ties; in bf16 not more
than rounding explains; else ours stops with an error and others are left out.

The floor of a step is reading what it needs once from memory: the weights of body and head, and the
keys and values that the rows hold on average. The bandwidth is measured with the same threads, in
turn with the rest. Each of the others holds a copy of the weights.

With --check N nothing is timed: N random prompts are answered by transformers alone and by ours,
greedily one by one and four at a time, padded on the left, and some of them by drawing with a seed
and by 4 beams. In fp32 all tokens must be the same. In bf16 the report says where answers first
differ, and how near the two best logits are there; a greedy one must be explained by rounding.

With --requests N continuous batching is timed: N requests with prompts of 8 to 256 tokens, and
answers of a quarter of --new-tokens to all of them, come at random times to the manager behind
transformers' generate_batch. In fp32 all answers must be the same.""",
        """\
examples:
  splitpoint bench generate smollm2 --entrants eager,ours
  splitpoint bench generate smollm2 --prompts 128,1024 --batches 1,8 --threads 2 --plot bars.png
  splitpoint bench generate llama-1b --entrants llamacpp,ours --new-tokens 32 --json out.json
  splitpoint bench generate smollm2 --check 64 --new-tokens 128 --dtype fp32
  splitpoint bench generate smollm2 --requests 32 --rate 8""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--prompts",
        type=positives,
        default=[128, 1024],
        metavar="N,N,...",
        help="lengths of the prompts, in tokens (default: 128,1024)",
    )
    parser.add_argument(
        "--new-tokens",
        type=two_or_more,
        default=64,
        metavar="N",
        help="tokens that each row makes (default: %(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=positives,
        default=[1, 8],
        metavar="N,N,...",
        help="rows of a batch (default: 1,8)",
    )
    parser.add_argument(
        "--entrants",
        type=some_of(GENERATORS),
        default=[name for name in GENERATORS if "-q" not in name],
        metavar="NAME,...",
        help=f"what to compare: {', '.join(GENERATORS)} (default: all that round no weights)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=3,
        metavar="N",
        help="how often each generates, after a first time that is not counted "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        type=positive,
        metavar="N",
        help="time nothing: compare the answers to N prompts with transformers', token by token",
    )
    parser.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help="time continuous batching instead: N requests of mixed lengths, in turn by "
        "transformers alone and compiled",
    )
    parser.add_argument(
        "--rate",
        type=above_zero,
        metavar="R",
        help="with --requests: how many come a second (default: 8)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    parser.add_argument(
        "--plot", "--png", dest="png", type=Path, metavar="FILE", help="write bars as PNG"
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="do not read weights, draw them: enough to time a model's shapes; MODEL may then "
        "be a config.json file",
    )
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)


def add_bench_perplexity(verbs: Any, run: Verb) -> None:
    """Add `splitpoint bench perplexity`."""
    parser = verb(
        verbs,
        "perplexity",
        run,
        "how well a model predicts a text, with weights as they are and rounded",
        """\
Compiles the model once for each kind of weights (Config.weights), and prints the perplexity of a
text: e to the mean of -ln of the probability that the model gives each token. The text is cut into
windows that the model sees alone. Lower is better; what counts is by how much rounding the weights
raises it.""",
        """\
examples:
  splitpoint bench perplexity smollm2 README.md
  splitpoint bench perplexity ./my-model text.txt --weights none,int4 --tokens 5000""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("text", type=Path, metavar="FILE", help="a text, in UTF-8")
    parser.add_argument(
        "--weights",
        type=some_of(WEIGHTS),
        default=list(WEIGHTS),
        metavar="KIND,...",
        help=f"what to compare: {', '.join(WEIGHTS)} (default: all)",
    )
    parser.add_argument(
        "--activations",
        type=some_of(ACTIVATIONS),
        default=list(ACTIVATIONS),
        metavar="KIND,...",
        help=f"beside int8 and int4, what activations are compared in: {', '.join(ACTIVATIONS)} "
        f"(default: all)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=20_000,
        metavar="N",
        help="how much of the text is read, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=positive,
        default=512,
        metavar="N",
        help="tokens that the model sees at once (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write environment and rows as JSON"
    )
    layers_argument(parser)
    run_arguments(parser)
