"""`splitpoint bench encode`: sentence embeddings of many texts, batch and length both changing."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import Config, compile
from ..errors import OutputMismatch
from ..ranges import align
from ..report.environment import environment
from ..runtime.compiled_model import CompiledModel
from ..tuning.measure import clock_for
from .cost import Cost, cost_of

BATCHES = (1, 2, 4, 8, 16, 32, 64)
MAX_LENGTH = 256
"""Tokens that a text is cut to, as its model card says."""

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far an element of a vector may be from fp32's by the dtype alone."""

CONFIG = Config(max_size=BATCHES[-1] * MAX_LENGTH, split_points=[16, 64, 256, 1024])
EAGER, COMPILED, OURS = "eager", "torch.compile(dynamic=True)", "splitpoint"

Batch = Mapping[str, Tensor]
"""`input_ids` and `attention_mask`, [batch, length]."""


@dataclass(frozen=True)
class Row:
    """One way to encode."""

    name: str
    texts_per_s: float
    spread: float
    """Interquartile range over the median, of the rounds."""
    error: float
    """The greatest difference of a vector's element from the model's own in fp32."""
    compile_s: float
    """CPU seconds until all batches were encoded once, less those of one round."""
    after: int | None
    """Pieces compiled after the first call; None where that is not known."""


@dataclass(frozen=True)
class EncodeReport:
    """The outcome; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=2)

    def __str__(self) -> str:
        eager = self.rows[0].texts_per_s
        heading = ("", "texts/s", "of eager", "spread", "error", "compile CPU s", "compiles after")
        cells = [
            (
                row.name,
                f"{row.texts_per_s:.1f}",
                f"{row.texts_per_s / eager:.2f}x",
                f"{row.spread:.0%}",
                f"{row.error:.1e}",
                f"{row.compile_s:.1f}",
                "" if row.after is None else f"{row.after}",
            )
            for row in self.rows
        ]
        env = self.environment
        return "\n".join(
            [
                f"{env['model']} in {env['dtype']}: {env['texts']} texts in {env['batches']} "
                f"batches of 1 to {BATCHES[-1]},",
                f"{env['tokens']} tokens padded to each batch's longest, {env['threads']} "
                f"thread(s), {env['clock']}",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *align([heading, *cells], right={1, 2, 3, 4, 5, 6}),
                "",
                "Medians of rounds that take turns. The error is that of normalised means of the "
                "last hidden",
                "states, beside the same model in fp32; eager's own shows what the dtype costs.",
            ]
        )


def texts(tokenizer: Any, count: int, seed: int = 0) -> list[str]:
    """Texts of a few to a few hundred tokens, most of them short, of the tokenizer's own words."""
    chance = random.Random(seed)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    return [
        " ".join(chance.choices(words, k=max(1, round(chance.lognormvariate(2.7, 0.8)))))
        for _ in range(count)
    ]


def batches(tokenizer: Any, given: Sequence[str], seed: int = 0) -> list[Batch]:
    """The texts in batches of mixed sizes, each padded to its longest text."""
    chance = random.Random(seed)
    found: list[Batch] = []
    at = 0
    while at < len(given):
        size = chance.choice(BATCHES)
        made = tokenizer(
            list(given[at : at + size]),
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        found.append({name: made[name] for name in ("input_ids", "attention_mask")})
        at += size
    return found


def embed(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Normalised means of the last hidden states over the tokens of each text."""
    hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, dim=1)


def encoder(model: torch.nn.Module, config: Config = CONFIG) -> CompiledModel:
    """A compiled encoder of Hugging Face's."""
    dims = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}
    most = {"batch": BATCHES[-1], "length": MAX_LENGTH}
    return compile(model, config, dynamic_dims=dims, max_dims=most)


def run(
    load: Callable[[torch.dtype], tuple[Any, Any]],
    name: str,
    dtype: torch.dtype,
    *,
    count: int = 1000,
    rounds: int = 5,
    threads: int = 1,
    config: Config = CONFIG,
    say: Callable[[str], None] = lambda _: None,
) -> EncodeReport:
    """Encode texts in several ways, after checking their vectors.

    Args:
        load: the model and its tokenizer in a dtype.
        name: of the model, for the report.
        dtype: of the weights.
        count: texts.
        rounds: how often all texts are encoded in each way.
        threads: of torch.
        config: of splitpoint.
        say: told what is done.

    Raises:
        OutputMismatch: when vectors are further from fp32's than the dtype explains.
    """
    torch.set_num_threads(threads)
    clock = clock_for(threads)
    reference, tokenizer = load(torch.float32)
    given = batches(tokenizer, texts(tokenizer, count))
    with torch.inference_mode():
        say("encoding in fp32 for reference ...")
        wanted = _all(reference, given)
        model = load(dtype)[0]
        ours = encoder(model, config)
        ways = {EAGER: model, COMPILED: torch.compile(model, dynamic=True), OURS: ours}
        costs: dict[str, Cost] = {}
        errors: dict[str, float] = {}
        first = 0
        for way, forward in ways.items():
            say(f"{way}: compiling and checking ...")
            _, once = cost_of(partial(embed, forward, given[0]))
            first = ours.stats().compilations
            made, rest = cost_of(partial(_all, forward, given))
            costs[way] = Cost(once.cpu_s + rest.cpu_s, once.wall_s + rest.wall_s)
            errors[way] = max(
                float((a.float() - b).abs().max()) for a, b in zip(made, wanted, strict=True)
            )
            allowed = max(ROUNDING[dtype], 2 * errors[EAGER] if way != EAGER else 0.0)
            if errors[way] > allowed:
                raise OutputMismatch(
                    f"{way} is off by {errors[way]:.1e} from fp32, where {allowed:.1e} is allowed"
                )
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds} ...")
            order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
            for way in order:
                start = clock.read()
                _all(ways[way], given)
                seconds[way].append(clock.read() - start)
    after = ours.stats().compilations - first
    rows = tuple(
        _row(way, count, seconds[way], errors[way], costs[way], after if way == OURS else None)
        for way in ways
    )
    facts = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "texts": count,
        "batches": len(given),
        "tokens": sum(batch["input_ids"].numel() for batch in given),
        "threads": threads,
        "clock": clock.name,
    }
    return EncodeReport(environment() | facts, rows)


def _all(model: Callable[..., Any], given: Sequence[Batch]) -> list[Tensor]:
    return [embed(model, batch) for batch in given]


def _row(
    way: str, count: int, seconds: Sequence[float], error: float, cost: Cost, after: int | None
) -> Row:
    median = statistics.median(seconds)
    several = seconds if len(seconds) > 1 else [median, median]  # one round has no spread
    low, _, high = statistics.quantiles(several, n=4, method="inclusive")
    compiling = max(0.0, cost.cpu_s - median)
    return Row(way, count / median, (high - low) / median, error, compiling, after)
