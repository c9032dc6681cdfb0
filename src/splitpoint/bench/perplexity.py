"""`splitpoint bench perplexity`: how well a model predicts a text, by what its weights are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import Config, compile
from ..config import Activations, Weights
from ..errors import UsageError
from ..models.catalogue import DTYPES, load
from ..ranges import align
from ..report.environment import environment

AS_THEY_ARE = "as they are"


@dataclass(frozen=True)
class PerplexityRow:
    """What came of one kind of weights."""

    weights: str
    """"int8", "int4", or `AS_THEY_ARE`; and, after a comma, what activations are rounded to."""
    perplexity: float
    """e to the mean of -ln of the probability that the model gives each token."""
    packed_bytes: int
    """Of the copies of weights that the kernels read."""
    note: str = ""
    """Which layers round activations, as the plan says."""


@dataclass(frozen=True)
class PerplexityReport:
    """A row for each kind of weights; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[PerplexityRow, ...]

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=2)

    def __str__(self) -> str:
        env = self.environment
        cells = [("weights", "perplexity", "more", "MiB packed")]
        first = self.rows[0].perplexity
        for row in self.rows:
            more = "" if row is self.rows[0] else f"{row.perplexity / first - 1:+.1%}"
            size = f"{row.packed_bytes / 2**20:.1f}" if row.packed_bytes else ""
            cells.append((row.weights, f"{row.perplexity:.3f}", more, size))
        return "\n".join(
            [
                f"{env['model']}, {env['dtype']}, {env['tokens']} tokens of {env['text']} in "
                f"windows of {env['window']}",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *align(cells, right={1, 2, 3}),
                *("" for row in self.rows[:1] if any(each.note for each in self.rows)),
                *(f"{row.weights}: {row.note}" for row in self.rows if row.note),
            ]
        )


def run(
    name: str,
    text: Path,
    *,
    weights: Sequence[Weights | None] = (None, "int8", "int4"),
    activations: Sequence[Activations] = ("int8",),
    dtype: str = "bf16",
    threads: int = 1,
    tokens: int = 20_000,
    window: int = 512,
    layers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PerplexityReport:
    """The perplexity of a text's first `tokens` tokens, for each kind of weights, and for int8 and
    int4 with each kind of `activations`, in the layers where that is faster at a whole window.

    The text is cut into windows that the model sees alone, each token but a window's first
    predicted from those before it. Logits come from the compiled model.

    Raises:
        ModelNotFound: as `load`.
        UsageError: when the text cannot be read or is too short, or the model has no tokenizer or
            fewer positions than a window.
    """
    try:
        content = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {text}: {error}") from error
    say(f"loading {name} ({dtype}) ...")
    model, tokenizer = load(name, DTYPES[dtype], layers=layers)
    if tokenizer is None:
        raise UsageError(f"{name} has no tokenizer: a text cannot be read")
    most = getattr(model.config, "max_position_embeddings", None) or window
    if not 2 <= window <= most:
        raise UsageError(f"--window must be from 2 to the model's {most} positions, got {window}")
    ids = tokenizer(content, add_special_tokens=False)["input_ids"][:tokens]
    if len(ids) < 2:
        raise UsageError(f"{text} has {len(ids)} tokens: two are the least")
    torch.set_num_threads(threads)
    rows = []
    kinds: list[tuple[Weights | None, Activations | None]] = [
        (kind, each) for kind in weights for each in ((None, *activations) if kind else (None,))
    ]
    for kind, rounded in kinds:
        label = (kind or AS_THEY_ARE) + (f", activations {rounded}" if rounded else "")
        say(f"weights {label}: compiling, and reading the text ...")
        config = Config(max_size=window, weights=kind, activations=rounded)
        if rounded:  # measured at a whole window alone, with time for all layers
            config = replace(config, compile_sizes=[window], linear_budget_s=60.0)
        compiled = compile(model, config, dynamic_dims={"input_ids": 1})
        found = perplexity(lambda part, call=compiled: call(part, use_cache=False), ids, window)
        note = compiled.plan.entry_for(window).note if rounded else ""
        rows.append(PerplexityRow(label, found, compiled.stats().packed_bytes, note))
        compiled.reset()
    facts = {"model": name, "dtype": dtype, "threads": threads, "text": text.name}
    facts |= {"tokens": len(ids), "window": window}
    return PerplexityReport(environment() | facts, tuple(rows))


def perplexity(logits_of: Callable[..., Any], ids: Sequence[int], window: int) -> float:
    """Of ids in windows; `logits_of` maps [1, tokens] to what has logits [1, tokens, words]."""
    total, count = 0.0, 0
    for first in range(0, len(ids) - 1, window):
        part = torch.tensor([ids[first : first + window]])
        if part.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = logits_of(part).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, part[0, 1:], reduction="sum"))
        count += part.shape[1] - 1
    return math.exp(total / count)
