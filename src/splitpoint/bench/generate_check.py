"""`splitpoint bench generate --check`: whether the same tokens come as from transformers alone."""

from __future__ import annotations

import copy
import json
import random
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import OutputMismatch
from ..integrations.transformers.copies import with_config
from ..integrations.transformers.rounding import rounding
from ..ranges import align
from ..report.environment import environment
from .answer import check_length
from .decoder import prepare
from .differences import LONGEST_PROMPT, NEAR, Answers, Compared, compare, random_prompts
from .entrants import Say
from .forward import start_up
from .forward_report import WIDTH

PADDED = 4
"""Prompts of a batch, padded on the left."""

DRAWN = 8
"""Prompts at most that are answered by drawing, and by beams."""

BEAMS, SEED = 4, 7

EAGERS = "eager's"


@dataclass(frozen=True)
class Way:
    """One way to ask a model's `generate`."""

    name: str
    batch: int = 1
    most: int | None = None
    """How many prompts at most; None for all."""
    how: tuple[tuple[str, Any], ...] = (("do_sample", False),)

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.how == Way.how


WAYS = (
    Way("greedy, batch 1"),
    Way(f"greedy, batch {PADDED}, left-padded", PADDED),
    Way(f"drawn, seed {SEED}", 1, DRAWN, (("do_sample", True),)),
    Way(f"{BEAMS} beams", 1, DRAWN, (("do_sample", False), ("num_beams", BEAMS))),
)


@dataclass(frozen=True)
class GenerateCheckReport:
    """The outcome; `print` it."""

    environment: dict[str, Any]
    rows: tuple[tuple[str, Compared], ...]
    """Of each way its name, and the answers compared."""

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`."""
        rows = [{"way": name, **asdict(compared)} for name, compared in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=2)

    def __str__(self) -> str:
        env = self.environment
        heading = ("", "answers", "the same", "tokens each", "log-probability off by")
        cells = [
            (
                name,
                str(found.answers),
                str(found.same),
                str(found.tokens),
                "" if found.largest is None else f"{found.largest:.2g}",
            )
            for name, found in self.rows
        ]
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        lines = [
            f"{env['model']}, {env['dtype']}, {threads}: beside transformers' generate, token for "
            f"token; torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
            *[f"{name}: {found.where(EAGERS)}" for name, found in self.rows if found.differences],
        ]
        first, *rest = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines]
        table = align([heading, *cells], right={1, 2, 3, 4})
        return "\n".join([first, "", *table, *(["", *rest] if rest else [])])

    def require(self) -> None:
        """Raise where more than rounding differs.

        Raises:
            OutputMismatch: for any difference in fp32; in bf16 for a greedy answer that differs
                where one token was clearly the best.
        """
        dtype = self.environment["dtype"]
        for name, found in self.rows:
            for each in found.differences:
                if dtype == "fp32":
                    explained = "fp32 leaves nothing to rounding"
                elif each.gap is not None and each.gap > NEAR[dtype]:
                    explained = f"{each.gap:.3g} lie between the two best logits there, and "
                    explained += f"rounding explains {NEAR[dtype]}"
                else:
                    continue
                raise OutputMismatch(
                    f"{name}: prompt {each.prompt} is answered otherwise than by transformers from "
                    f"token {each.token} on; {explained}"
                )


def check(
    model: Any,
    name: str,
    config: Config,
    *,
    prompts: int = 64,
    new_tokens: int = 64,
    threads: int = 1,
    ways: Sequence[Way] = WAYS,
    say: Say = lambda line: None,
) -> GenerateCheckReport:
    """Let transformers answer random prompts of 1 to 100 tokens, alone and over what was compiled.

    `threads` is set for torch in the whole process.

    Raises:
        UsageError: for more tokens than the model has positions.
        UnsupportedModel: when it is no model for the paged cache.
    """
    check_length(model, name, LONGEST_PROMPT, new_tokens)
    start_up(threads)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = None
    ours = with_config(model, {})  # the same weights: the other stays as it is
    prepare(ours, config)
    asked = random_prompts(prompts, random.Random(0), min(model.config.vocab_size, 1000))
    rows = []
    for way in ways:
        some = asked[: way.most]
        say(f"{way.name}: {len(some)} prompts ...")
        with rounding(model, config.weights, keep=True, activations=config.activations):
            own = answers(model, some, new_tokens, way)
        rows.append((way.name, compare(own, answers(ours, some, new_tokens, way))))
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[model.dtype]
    facts = {"model": name, "dtype": dtype, "threads": threads, "prompts": prompts}
    return GenerateCheckReport(environment() | facts, tuple(rows))


def answers(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, way: Way) -> Answers:
    """What a model's `generate` says to each prompt."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(prompts), way.batch):
        ids, mask = left_padded(prompts[start : start + way.batch])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            made = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=way.is_greedy,
                **dict(way.how),
            )
        tokens = made.sequences[:, ids.shape[1] :].tolist()
        logprobs = _logprobs(made.logits) if way.is_greedy else [[] for _ in tokens]
        found += [{"tokens": t, "logprobs": p} for t, p in zip(tokens, logprobs, strict=True)]
    return found


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [batch, tokens], int64: each prompt at the end of its row."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(each)) + list(each) for each in prompts])
    lengths = torch.tensor([[len(each)] for each in prompts])
    return ids, (torch.arange(width) >= width - lengths).long()


def _logprobs(steps: Sequence[Tensor]) -> list[list[tuple[float, float]]]:
    """Of each row and step [batch, vocabulary] the best two log-probabilities."""
    best = [torch.log_softmax(logits.float(), -1).topk(2).values.tolist() for logits in steps]
    return [[tuple(step[row]) for step in best] for row in range(len(best[0]))]
