"""`splitpoint run`: a model, split over ranks, compiled for ranges, answers a prompt."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import CompiledModel, Config, compile
from ..collectives import agreement, workspace
from ..collectives.launch import run_ranks
from ..collectives.policy import Policy
from ..errors import UsageError, WorkspaceError
from ..models.catalogue import DTYPES
from ..models.tensor_parallel import load
from ..passes.allreduce_rmsnorm import AllReduceRMSNorm
from ..passes.shared_memory import SharedMemoryAllReduce

Collectives = Literal["auto", "shm", "gloo"]
COMPILE_PATIENCE_S = 600.0
"""How long a rank may wait for one that still compiles."""


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
    seconds: float
    """The median of a forward pass of the answer."""

    def __str__(self) -> str:
        return "\n".join([self.text, "", self.plan, "", self.summary])


def run(job: Job, *, tp: int | None, threads: int) -> Answer | None:
    """Start `tp` ranks, or be one where torchrun has started this process, and answer.

    Returns:
        The answer; None in a rank of torchrun other than 0.

    Raises:
        UsageError: when `tp` is not the number of ranks that torchrun started.
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
    ids = _prompt_ids(tokenizer, job.prompt)
    config = Config.from_json(job.config)
    if len(ids) + job.tokens > config.max_size:
        raise UsageError(
            f"a prompt of {len(ids)} tokens and an answer of {job.tokens} exceed max_size="
            f"{config.max_size}: raise --max-size or ask for fewer --tokens"
        )
    attached, served_by = attach(group, job.collectives)
    with attached:
        compiled = compile(model, with_collectives(config, Policy.from_json(job.policy)))
        found, seconds = _generate(compiled, ids, job.tokens, tokenizer.eos_token_id)
        ranks = group.size() if group is not None else 1
        summary = [f"{ranks} {'ranks' if ranks > 1 else 'rank'}, {served_by}", matched(compiled)]
        step = statistics.median(seconds)
        summary.append(f"{1e3 * step:.1f} ms a token (median; no KV cache: all tokens each time)")
        text = tokenizer.decode(found, skip_special_tokens=True)
        return Answer(text, str(compiled.plan), "\n".join(filter(None, summary)), step)


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


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt)["input_ids"])
    chat = [{"role": "user", "content": prompt}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(given["input_ids"])


def _generate(
    step: Callable[[Tensor, Tensor], Tensor], prompt: list[int], tokens: int, end: int | None
) -> tuple[list[int], list[float]]:
    """Greedy tokens after a prompt, and the seconds that each took. All ranks have the same
    logits to the bit, and so the same tokens."""
    ids, seconds = list(prompt), []
    for size in sorted({len(prompt), len(prompt) + tokens - 1}):  # compile before the clock runs
        step(torch.zeros(size, dtype=torch.long), torch.arange(size))
    while len(ids) < len(prompt) + tokens:
        start = time.perf_counter()
        logits = step(torch.tensor(ids), torch.arange(len(ids)))
        ids.append(int(logits.argmax()))
        seconds.append(time.perf_counter() - start)
        if ids[-1] == end:
            break
    return ids[len(prompt) :], seconds


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
