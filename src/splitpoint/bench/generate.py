"""`splitpoint bench generate`: time to the first token and of each further one, side by side."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import Config
from ..errors import BaselineFailed, KernelBuildError, OutputMismatch, UsageError
from ..integrations.transformers.rounding import rounding
from ..kernels.packed_linear import PackedLinear
from ..report.environment import environment
from ..tuning.measure import WALL_TIME, Clock
from .answer import check_length
from .entrants import Say
from .floor import READ, Probes
from .forward import start_up
from .forward_report import Measured
from .generate_report import Divergence, GenerateReport, GenerateRow
from .generators import EAGER, GENERATORS, OURS, Generate, Run, Setting

GAPS = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""How much likelier eager's token may be than the one that another way chose in its place, in
deviations of the logits there: what rounding explains. In bfloat16 logits are off by some 0.03."""

GAP_OF_ROUNDED = 1.0
"""The same where activations are rounded to int8. That moves SmolLM2's logits by a fifth of a
deviation, and by as much again where anything before it is rounded otherwise."""

READS = 4
"""Reads of memory after each generation, of which the best of all counts."""


def run(
    model: Any,
    name: str,
    config: Config,
    *,
    prompts: Sequence[int] = (128, 1024),
    new_tokens: int = 64,
    batches: Sequence[int] = (1, 8),
    entrants: Sequence[str] = tuple(GENERATORS),
    rounds: int = 3,
    threads: int = 1,
    say: Say = lambda line: None,
) -> GenerateReport:
    """Let several ways generate from the same random prompts, and time them in turn.

    What each way chose is compared with eager's tokens first. `threads` is set for torch in the
    whole process, and given to the others.

    Raises:
        UsageError: for a way that there is not, too few tokens, or more than the model has
            positions.
        OutputMismatch: when splitpoint's tokens are others than rounding explains.
    """
    check_generators(entrants)
    if new_tokens < 2:
        raise UsageError("a time for each further token needs --new-tokens of 2 or more")
    for prompt in prompts:
        check_length(model, name, prompt, new_tokens)
    start_up(threads)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = None
    measuring = _Measuring(Setting(model, name, config, threads, WALL_TIME), say)
    measuring.build(entrants)
    rows = [
        row
        for prompt in prompts
        for batch in batches
        for row in measuring.cell(prompt, batch, new_tokens, rounds)
    ]
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(model.dtype, str(model.dtype))
    facts = {
        "model": name,
        "dtype": dtype,
        "threads": threads,
        "clock": WALL_TIME.name,
        "rounds": rounds,
        "new_tokens": new_tokens,
        "about": {each: GENERATORS[each].about for each in measuring.generates},
        "prepare_s": measuring.prepare_s,
        "read_gb_s": measuring.read_gb_s,
        "notes": measuring.notes,
    }
    return GenerateReport(environment() | facts, tuple(rows))


def check_generators(names: Sequence[str]) -> None:
    """Raises `UsageError` for a way to generate that there is not, or where there is none."""
    unknown = [name for name in names if name not in GENERATORS]
    if unknown or not names:
        raise UsageError(
            f"there is no entrant {', '.join(map(repr, unknown)) or 'at all'}: choose from "
            f"{', '.join(GENERATORS)}"
        )


def random_prompts(vocabulary: int, batch: int, prompt: int) -> Tensor:
    """Ids [batch, prompt], int64; the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(1_000_003 * batch + prompt)
    return torch.randint(vocabulary, (batch, prompt), generator=generator)


@dataclass
class _Measuring:
    """What is measured, and what was learnt about it on the way."""

    setting: Setting
    say: Say
    generates: dict[str, Generate] = field(default_factory=dict)
    prepare_s: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    read_gb_s: float | None = None
    """Of memory, in the last of what was measured."""
    probes: Probes | None = None

    @property
    def clock(self) -> Clock:
        """What all is measured on."""
        return self.setting.clock

    def build(self, names: Sequence[str]) -> None:
        """Prepare what is installed, and note the rest."""
        for generator in (GENERATORS[name] for name in dict.fromkeys(names)):
            if missing := generator.missing:
                self.notes.append(f"{generator.name} was left out: {missing}.")
                continue
            self.say(f"{generator.name}: preparing ...")
            start = self.clock.read()
            try:
                self.generates[generator.name] = generator.build(self.setting)
                self.prepare_s[generator.name] = self.clock.read() - start
            except (BaselineFailed, ImportError) as error:
                self.notes.append(f"{generator.name} was left out: {error}.")
        try:
            model = self.setting.model
            self.probes = Probes(model.dtype, int(step_bytes(model, 0, 0)))
        except KernelBuildError as error:
            self.notes.append(f"There is no floor, as memory cannot be read: {error}.")

    def cell(self, prompt: int, batch: int, new_tokens: int, rounds: int) -> list[GenerateRow]:
        """A row for each way that serves a batch of prompts."""
        what = f"{batch} x {prompt} tokens"
        model = self.setting.model
        ids = random_prompts(model.config.vocab_size, batch, prompt)
        eager = self.generates.get(EAGER) or GENERATORS[EAGER].build(self.setting)
        warm_up: dict[str, float] = {}
        divergences: dict[str, Divergence | None] = {}
        self.say(f"{what}: {EAGER}, to compare with ...")
        start = self.clock.read()
        expected = eager(ids, new_tokens).tokens
        warm_up[EAGER] = self.clock.read() - start
        for name, generate in self.generates.items():
            if name == EAGER:
                divergences[name] = None
                continue
            self.say(f"{what}: {name}, warming up and checking ...")
            start = self.clock.read()
            try:
                found = generate(ids, new_tokens).tokens
                warm_up[name] = self.clock.read() - start
                own = self.setting.config if name == OURS else Config()
                with rounding(model, own.weights, keep=True, activations=own.activations):
                    differs = bool(own.weights or own.activations)
                    likeliest = eager(ids, new_tokens).tokens if differs else expected
                    gap = GAP_OF_ROUNDED if own.activations else GAPS[model.dtype]
                    most = math.inf if GENERATORS[name].rounds else gap
                    divergences[name] = checked(name, model, ids, likeliest, found, most)
            except (BaselineFailed, OutputMismatch) as error:
                if name == OURS:
                    raise
                self.notes.append(f"{name} was left out at {what}: {error}.")
        runs, reads = self._rounds(list(divergences), ids, new_tokens, rounds, what)
        floor_ms = None
        if self.probes is not None:
            # The best, as what disturbs a read does not lift the floor; a step reads as well.
            needed = step_bytes(model, batch, prompt + new_tokens / 2)
            steps = [
                run.step_s
                for name, each in runs.items()
                if not self._rounds_weights(name)
                for run in each
            ]
            seen = max([self.probes.read_bytes / min(reads), *(needed / step for step in steps)])
            self.read_gb_s = seen / 1e9
            floor_ms = needed / self.read_gb_s / 1e6
        return [
            GenerateRow(
                name,
                prompt,
                batch,
                _measured([each.first_s for each in runs[name]]),
                _measured([each.step_s for each in runs[name]]),
                warm_up[name],
                divergences[name],
                None if self._rounds_weights(name) else floor_ms,
            )
            for name in divergences
        ]

    def _rounds_weights(self, name: str) -> bool:
        """Whether it reads fewer bytes than the model has."""
        return GENERATORS[name].rounds or (name == OURS and bool(self.setting.config.weights))

    def _rounds(
        self, names: Sequence[str], ids: Tensor, new_tokens: int, rounds: int, what: str
    ) -> tuple[dict[str, list[Run]], list[float]]:
        runs: dict[str, list[Run]] = {name: [] for name in names}
        reads: list[float] = []
        for turn in range(rounds):
            self.say(f"{what}: round {turn + 1} of {rounds} ...")
            at = turn % len(names)
            for name in [*names[at:], *names[:at]]:
                runs[name].append(self.generates[name](ids, new_tokens))
                if self.probes is not None:
                    read = self.probes.calls()[READ]
                    for _ in range(READS):
                        start = self.clock.read()
                        read()
                        reads.append(self.clock.read() - start)
        return runs, reads


def checked(
    name: str,
    model: Any,
    ids: Tensor,
    expected: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    most: float,
) -> Divergence | None:
    """Where new tokens first differ from eager's, in any row; None where they do not. One may be
    `most` standard deviations of the logits less likely than eager's.

    Raises:
        OutputMismatch: when rounding does not explain it.
    """
    firsts = {
        row: next(at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        for row, (one, other) in enumerate(zip(expected, found, strict=True))
        if list(one) != list(other)
    }
    if not firsts:
        return None
    gaps: dict[int, float] = {}
    for row, at in firsts.items():
        before = torch.cat([ids[row], torch.tensor(expected[row][:at], dtype=ids.dtype)])
        with torch.no_grad():
            out = model(input_ids=before[None], use_cache=False, logits_to_keep=1)
        logits = out.logits[0, -1].float()
        gap = (logits[expected[row][at]] - logits[found[row][at]]) / logits.std()
        gaps[row] = float(gap)
    worst = max(gaps, key=lambda row: gaps[row])
    if not gaps[worst] <= most:
        raise OutputMismatch(
            f"{name} is wrong: after {firsts[worst]} tokens it chose one that is "
            f"{gaps[worst]:.2g} deviations less likely than eager's, more than rounding explains "
            f"({most}); it was not timed"
        )
    return Divergence(min(firsts.values()), gaps[worst])


def step_bytes(model: Any, batch: int, held: float) -> float:
    """Bytes that a step cannot do without reading: the weights of body and head, and the keys and
    values that each row holds."""
    parameters = {id(p): p for p in model.parameters()}
    if not getattr(model.config, "tie_word_embeddings", False):
        parameters.pop(id(model.get_input_embeddings().weight), None)
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    token: int = 2 * text.num_hidden_layers * kv_heads * size * model.dtype.itemsize
    packed = [m.packed for m in model.modules() if isinstance(m, PackedLinear)]
    weights: int = sum(p.nbytes for p in (*parameters.values(), *packed))
    return weights + batch * held * token


def _measured(seconds: Sequence[float]) -> Measured:
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return Measured(median * 1e3, 0.0)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Measured(median * 1e3, (high - low) / median)
