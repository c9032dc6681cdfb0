"""`splitpoint run`: a model, split over ranks, compiled for ranges, answers a prompt."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import CompiledModel, Config, compile, kernels
from ..bench.answer import prompt_ids
from ..collectives import agreement, workspace
from ..collectives.launch import run_ranks
from ..collectives.policy import Policy
from ..errors import UsageError, WorkspaceError
from ..models.catalogue import DTYPES
from ..models.tensor_parallel import TensorParallelLlama, load
from ..passes.allreduce_rmsnorm import AllReduceRMSNorm
from ..passes.shared_memory import SharedMemoryAllReduce
from ..runtime.paged_cache import CACHED_ATTENTION, CachedSequence, PagedCache

Collectives = Literal["auto", "shm", "gloo"]
COMPILE_PATIENCE_S = 600.0
"""How long a rank may wait for one that still compiles."""

MOST_SHARING = 8
"""Ranks that may have fewer cores than they are: they wait for each other, but answer."""


@dataclass(frozen=True)
class Job:
    """What the ranks are to do; all of it can be sent to a process."""

    model: str
    dtype: str
    config: str
    """JSON of a `Config`."""
    policy: str
    """JSON of a `Policy`; of no entries for the seeds alone."""
    collectives: Collectives
    prompt: str
    tokens: int
    """How many tokens to answer with."""
    layers: int | None


@dataclass(frozen=True)
class Answer:
    """What rank 0 has to tell."""

    text: str
    plan: str
    summary: str
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return "\n".join([self.text, "", self.plan, "", self.summary])


def run(job: Job, *, tp: int | None, threads: int) -> Answer | None:
    """Start `tp` ranks, or be one where torchrun has started this process, and answer.

    Returns:
        The answer; None in a rank of torchrun other than 0.

    Raises:
        UsageError: when `tp` is not the number of ranks that torchrun started, or far more than
            there are cores.
        RankFailed, ModelNotFound, WorkspaceError: as they come up in a rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = int(os.environ["WORLD_SIZE"])
        if tp not in (None, started):
            raise UsageError(
                f"--tp {tp} under torchrun, which started {started} processes: leave --tp out, "
                f"or start with --nproc-per-node {tp}"
            )
        torch.set_num_threads(threads)
        dist.init_process_group("gloo")
        try:
            answer = answer_in_rank(job)
            return answer if dist.get_rank() == 0 else None
        finally:
            dist.destroy_process_group()
    if tp in (None, 1):
        torch.set_num_threads(threads)
        return answer_in_rank(job)
    cores = os.cpu_count() or 1
    if tp > max(cores, MOST_SHARING):
        raise UsageError(
            f"{tp} ranks want {tp} cores, here are {cores}: --tp {max(cores, MOST_SHARING)} at most"
        )
    first: Answer = run_ranks(tp, threads, answer_in_rank, job)[0]
    return first


def answer_in_rank(job: Job) -> Answer:
    """What each rank does. One without a process group is the whole model."""
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is not None:
        agreement.same(group, "job", repr(job))
    model, tokenizer = load(job.model, DTYPES[job.dtype], group, layers=job.layers)
    if tokenizer is None:
        raise UsageError(f"{job.model} has no tokenizer: a prompt cannot be read")
    ids = prompt_ids(tokenizer, job.prompt)[0].tolist()
    config = Config.from_json(job.config)
    attached, served_by = attach(group, job.collectives)
    with attached:
        decoding = Decoding(
            model, with_collectives(config, Policy.from_json(job.policy)), len(ids) + job.tokens
        )
        found, seconds = decoding.answer(ids, job.tokens, tokenizer.eos_token_id)
        ranks = group.size() if group is not None else 1
        summary = [
            f"{ranks} {'ranks' if ranks > 1 else 'rank'}, {served_by}",
            matched(decoding.step),
            f"{1e3 * seconds[0]:.1f} ms until the first token ({len(ids)} tokens of prompt)",
        ]
        if len(seconds) > 1:
            summary.append(f"{1e3 * statistics.median(seconds[1:]):.1f} ms a token (median)")
        text = tokenizer.decode(found, skip_special_tokens=True)
        plan = str(decoding.step.plan)
        return Answer(text, plan, "\n".join(filter(None, summary)), tuple(found))


LEAST_CACHE = 2048
"""Tokens. Its capacity is part of what is compiled, so that most answers share one."""


class Decoding:
    """Greedy decoding in one rank: the rank's part of a model, compiled, and a paged cache of the
    keys and values of its heads.

    Args:
        model: the rank's part.
        config: the ranges, over the tokens of a step.
        tokens: how many the cache has to hold.

    Raises:
        KernelBuildError: when there is no attention over a cache here.
    """

    def __init__(self, model: TensorParallelLlama, config: Config, tokens: int) -> None:
        kernels.load()
        shape = model.shape
        capacity = max(LEAST_CACHE, 1 << (tokens - 1).bit_length())
        self.cache = PagedCache(
            *(shape.layers, shape.kv_heads, shape.head_dim, model.embedding.dtype),
            *(capacity, 1),
        )
        self.max_size = config.max_size
        self.step = compile(
            model,
            replace(config, splitting_ops=(*config.splitting_ops, CACHED_ATTENTION)),
            dynamic_dims={"ids": 0, "positions": 0},
        )

    def answer(
        self, prompt: Sequence[int], tokens: int, end: int | None
    ) -> tuple[list[int], list[float]]:
        """The tokens after a prompt, up to so many or `end`, and the seconds that each took. All
        ranks have the same logits to the bit, and so the same tokens."""
        sequence = self.cache.open()
        self._logits(sequence, prompt[:1])  # compiles before the clock runs
        self.cache.crop(sequence, 0)
        found: list[int] = []
        seconds: list[float] = []
        new = list(prompt)
        while len(found) < tokens and end not in found[-1:]:
            start = time.perf_counter()
            for first in range(0, len(new), self.max_size):
                logits = self._logits(sequence, new[first : first + self.max_size])
            new = [int(logits.argmax())]
            found += new
            seconds.append(time.perf_counter() - start)
        self.cache.close(sequence)
        return found, seconds

    def _logits(self, sequence: CachedSequence, ids: Sequence[int]) -> Tensor:
        """[1, vocabulary] after the next tokens of a sequence, at most `max_size`."""
        (held,), rows = self.cache.extend([sequence], [len(ids)])
        self.cache.tell([len(ids)], [held], rows)
        positions = torch.arange(held, held + len(ids))
        cache = self.cache.blocks, self.cache.steps, self.cache.tables
        found: Tensor = self.step(torch.tensor(ids), positions, *cache)
        return found


def attach(
    group: dist.ProcessGroup | None, collectives: Collectives
) -> tuple[AbstractContextManager[Any], str]:
    """A workspace for a group as a context, and what then serves its collectives.

    Raises:
        WorkspaceError: with "shm", where shared memory cannot serve the group.
    """
    if group is None:
        return nullcontext(), "no collectives"
    if collectives == "gloo":
        return nullcontext(), "collectives by gloo"
    try:
        made = workspace.attach(group, timeout_s=COMPILE_PATIENCE_S)
        return made, "collectives in shared memory"
    except WorkspaceError as error:
        if collectives == "shm":
            raise
        return nullcontext(), f"collectives by gloo: {error}"


def with_collectives(config: Config, policy: Policy) -> Config:
    """A configuration with the passes over collectives behind its own."""
    return replace(
        config, passes=(*config.passes, AllReduceRMSNorm(policy), SharedMemoryAllReduce())
    )


def matched(compiled: CompiledModel) -> str:
    """How many all-reduces were fused in each range, and what was left and why."""
    stats = compiled.stats()
    if not stats.matches:
        return ""
    lines = [
        f"{range_}: {count} all-reduce + norm fused"
        for range_, count in stats.matched("AllReduceRMSNorm").items()
    ]
    if any(count.matches is None for count in stats.matches):
        lines.append("some pieces came from a cache that says nothing of passes")
    lines += sorted({note for count in stats.matches for note in count.notes})
    return "\n".join(lines)


def read_policy(path: Path | None) -> Policy:
    """The policy of a file that `splitpoint tune collective` wrote.

    Raises:
        InvalidPolicy: when it is none.
        UsageError: when it cannot be read.
    """
    if path is None:
        return Policy()
    try:
        return Policy.from_json(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the policy {path}: {error.strerror}") from error
