"""`splitpoint bench generate --requests`: continuous batching, by transformers alone and compiled.

Requests of mixed lengths come at random times to the manager behind transformers' `generate_batch`,
which itself takes all of them at once.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import Config
from ..errors import BaselineFailed, OutputMismatch
from ..integrations.transformers.copies import with_config
from ..integrations.transformers.rounding import rounding
from ..ranges import align
from ..report.environment import environment
from ..tuning.measure import WALL_TIME, Clock
from .answer import check_length
from .decoder import prepare
from .differences import Compared, compare
from .entrants import Say
from .forward import start_up
from .forward_report import WIDTH
from .generators import EAGER, OURS

PROMPTS = (8, 256)
"""The shortest and the longest prompt, in tokens."""

PAGE_TOKENS = 256
"""Of transformers' cache, of which a request has whole pages."""

PATIENCE_S = 0.1
"""How long a look for results takes when no request is due."""


@dataclass(frozen=True)
class Request:
    """What comes, and when."""

    prompt: tuple[int, ...]
    new_tokens: int
    at_s: float
    """After the start."""


@dataclass(frozen=True)
class Served:
    """What became of all requests."""

    answers: tuple[tuple[int, ...], ...]
    """The new tokens of each."""
    seconds: float
    """From the start until the last was answered."""
    cpu_s: float
    """Of the process meanwhile, which waiting for requests does not take."""
    first_s: float
    """From a request until its first token, in the median."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all requests."""
        return sum(map(len, self.answers)) / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        """The same, of the process's CPU time."""
        return sum(map(len, self.answers)) / self.cpu_s


@dataclass(frozen=True)
class Rounds:
    """One way to serve, several times."""

    name: str
    tokens_per_s: tuple[float, ...]
    tokens_per_cpu_s: tuple[float, ...]
    first_s: tuple[float, ...]

    @classmethod
    def of(cls, name: str, served: Sequence[Served]) -> Rounds:
        """From what became of the requests each time."""
        return cls(
            name,
            tuple(each.tokens_per_s for each in served),
            tuple(each.tokens_per_cpu_s for each in served),
            tuple(each.first_s for each in served),
        )


@dataclass(frozen=True)
class ContinuousReport:
    """The outcome; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[Rounds, ...]
    compared: Compared
    """The answers of transformers alone, and ours."""

    @property
    def ratios(self) -> list[float]:
        """Our tokens a second over those of transformers, round by round."""
        eager, ours = (row.tokens_per_s for row in self.rows)
        return [b / a for a, b in zip(eager, ours, strict=True)]

    @property
    def cpu_ratios(self) -> list[float]:
        """The same of CPU time, which other processes on the machine leave as it is."""
        eager, ours = (row.tokens_per_cpu_s for row in self.rows)
        return [b / a for a, b in zip(eager, ours, strict=True)]

    def to_json(self) -> str:
        """The fields as an object, and both kinds of ratios."""
        found = asdict(self) | {"ratios": self.ratios, "cpu_ratios": self.cpu_ratios}
        return json.dumps(found, indent=2)

    def __str__(self) -> str:
        env = self.environment
        heading = ("", "tokens/s", "ratio", "tokens/CPU s", "ratio", "first token ms")
        cells = [
            (
                row.name,
                f"{statistics.median(row.tokens_per_s):.1f}",
                f"{statistics.median(self.ratios):.2f}" if row.name == OURS else "",
                f"{statistics.median(row.tokens_per_cpu_s):.1f}",
                f"{statistics.median(self.cpu_ratios):.2f}" if row.name == OURS else "",
                f"{1e3 * statistics.median(row.first_s):.0f}",
            )
            for row in self.rows
        ]
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        lines = [
            f"{env['model']}, {env['dtype']}, {threads}: {env['requests']} requests, "
            f"{env['rate']:g} a second, prompts of {PROMPTS[0]} to {PROMPTS[1]} tokens, answers of "
            f"up to {env['new_tokens']}; torch {env['torch']} on {env['cpu']} "
            f"({env['cpu_capability']})",
            f"{self.compared.same} of {self.compared.answers} answers are the same, token for "
            f"token. Medians of {env['rounds']} rounds in turn, after one that is not counted; the "
            f"first token's time is from the request on.",
        ]
        first, last = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines]
        return "\n".join([first, "", *align([heading, *cells], right={1, 2, 3, 4, 5}), "", last])

    def require(self) -> None:
        """Raise where answers differ that rounding leaves alone.

        Raises:
            OutputMismatch: for any difference in fp32.
        """
        first = self.compared.first
        if first is not None and self.environment["dtype"] == "fp32":
            raise OutputMismatch(
                f"request {first.prompt} is answered otherwise than by transformers from token "
                f"{first.token} on; fp32 leaves nothing to rounding"
            )


def run(
    model: Any,
    name: str,
    config: Config,
    *,
    requests: int = 32,
    rate: float = 8.0,
    new_tokens: int = 64,
    rounds: int = 3,
    threads: int = 1,
    say: Say = lambda line: None,
) -> ContinuousReport:
    """Serve the same requests by both, in turn, after a first time that is compared and not timed.

    `threads` is set for torch in the whole process.

    Raises:
        UsageError: for more tokens than the model has positions.
        UnsupportedModel: when it is no model for the paged cache.
        BaselineFailed: when transformers answers a request with an error.
    """
    check_length(model, name, PROMPTS[1], new_tokens)
    start_up(threads)
    ours = with_config(model, {})  # the same weights: the other stays as it is
    say(f"{OURS}: preparing ...")
    prepare(ours, config)
    asked = mixed(requests, rate, new_tokens, min(model.config.vocab_size, 1000))
    models = {EAGER: model, OURS: ours}
    first: dict[str, Served] = {}
    for each, served_by in models.items():
        say(f"{each}: {requests} requests, to compare ...")
        kinds = (config.weights, config.activations) if each == EAGER else (None, None)
        with rounding(model, kinds[0], keep=True, activations=kinds[1]):
            first[each] = serve(served_by, asked, config.max_size, WALL_TIME)
    found: dict[str, list[Served]] = {each: [] for each in models}
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds} ...")
        for each in models if turn % 2 == 0 else reversed(models):
            found[each].append(serve(models[each], asked, config.max_size, WALL_TIME))
    own, other = (
        [{"tokens": list(tokens), "logprobs": []} for tokens in each.answers]
        for each in first.values()
    )
    facts = {
        "model": name,
        "dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[model.dtype],
        "threads": threads,
        "requests": requests,
        "rate": rate,
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    rows = [Rounds.of(each, served) for each, served in found.items()]
    return ContinuousReport(environment() | facts, tuple(rows), compare(own, other))


def mixed(count: int, rate: float, new_tokens: int, vocabulary: int) -> list[Request]:
    """Requests of mixed lengths, `rate` a second (inf: all at once); the same ones each time."""
    numbers = random.Random(0)
    found, at_s = [], 0.0
    for _ in range(count):
        prompt = [numbers.randrange(5, vocabulary) for _ in range(numbers.randint(*PROMPTS))]
        length = numbers.randint(max(1, new_tokens // 4), new_tokens)
        found.append(Request(tuple(prompt), length, at_s))
        at_s += 0.0 if math.isinf(rate) else numbers.expovariate(rate)
    return found


def serve(model: Any, asked: Sequence[Request], most_tokens: int, clock: Clock) -> Served:
    """Answer requests as they come, with at most so many tokens in a step.

    Raises:
        BaselineFailed: when one is answered with an error.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pages = sum(-(-(len(each.prompt) + each.new_tokens) // PAGE_TOKENS) for each in asked)
    manager = model.continuous_batching_context_manager(
        generation_config=GenerationConfig(
            eos_token_id=-1, do_sample=False, pad_token_id=0, max_new_tokens=1
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=pages + 1, max_batch_tokens=most_tokens
        ),
    )
    waiting = list(enumerate(asked))
    results: dict[str, Any] = {}
    with manager as serving:
        start, cpu_start = clock.read(), time.process_time()
        while len(results) < len(asked):
            now = clock.read() - start
            while waiting and waiting[0][1].at_s <= now:
                number, request = waiting.pop(0)
                serving.add_request(
                    list(request.prompt),
                    request_id=f"r{number}",
                    max_new_tokens=request.new_tokens,
                    record_timestamps=True,
                )
            due = waiting[0][1].at_s - now if waiting else PATIENCE_S
            result = serving.get_result(timeout=min(max(due, 1e-4), PATIENCE_S))
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise BaselineFailed(f"{result.request_id} was answered with: {result.error}")
                results[result.request_id] = result
            elif result is None and not serving.is_running():
                raise BaselineFailed("transformers' thread ended before all requests were answered")
        seconds, cpu_s = clock.read() - start, time.process_time() - cpu_start
    ordered = [results[f"r{number}"] for number in range(len(asked))]
    return Served(
        tuple(tuple(each.generated_tokens) for each in ordered),
        seconds,
        cpu_s,
        statistics.median(each.timestamps[0] - each.created_time for each in ordered),
    )
