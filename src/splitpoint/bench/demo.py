"""`splitpoint demo`: a real model, compiled for ranges, speaks, and is then timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import CompiledModel, Config
from ..errors import ModelNotFound, UsageError
from ..models.catalogue import DTYPES, SMOLLM2, load
from ..paths import cache_folder
from .entrants import Say
from .forward import check_sizes, compare, compile_splitpoint, start_up
from .forward_report import ForwardReport
from .inputs import last_logits
from .picture import save_picture

SIZES = (1, 4, 16, 64, 256, 512)
NEW_TOKENS = 40


def run(
    config: Config, *, dtype: str, threads: int, prompt: str, png: Path, say: Say
) -> ForwardReport:
    """Load SmolLM2, compile it, let it answer `prompt`, compare its speed, and draw the curve.

    Prints the answer, the plan and the table; `say` is told what goes on meanwhile.

    Raises:
        ModelNotFound: when the weights are not installed.
        UsageError: when max_size is below the sizes that are timed, or the prompt is too long.
        OutputMismatch: when a compiled model's output differs from eager's.
    """
    sizes = [size for size in SIZES if size <= config.max_size]
    check_sizes(sizes, config)
    say(f"loading {SMOLLM2} ({dtype}) ...")
    model, tokenizer = load(SMOLLM2, DTYPES[dtype])
    if tokenizer is None:
        raise ModelNotFound(f"{SMOLLM2} has lost its tokenizer: remove it from {cache_folder()}")
    ids = chat_ids(tokenizer, prompt, config.max_size)
    start_up(threads)
    compiled, cost = compile_splitpoint(model, config, sizes, say)
    whole = generate(compiled, ids, tokenizer.eos_token_id, config.max_size)
    print(f"{prompt}\n> {tokenizer.decode(whole[0, ids.shape[1] :]).strip()}")
    used = sorted({compiled.plan.range_for(n) for n in range(ids.shape[1], whole.shape[1])})
    print(
        f"(greedy and without a KV cache: sizes {ids.shape[1]} to {whole.shape[1] - 1}, "
        f"served by {', '.join(map(str, used))})\n"
    )
    print(compiled.plan, end="\n\n")
    report = compare(
        model, SMOLLM2, compiled, cost, sizes=sizes, threads=threads, budget_s=1.0, say=say
    )
    print(compiled.stats(), end="\n\n")
    print(report)
    save_picture(report, png)
    print(f"\nThe curve is in {png}")
    return report


def chat_ids(tokenizer: Any, prompt: str, max_size: int) -> Tensor:
    """The ids [1, size], int64, of a chat that starts with `prompt` and awaits the answer.

    Raises:
        UsageError: when there are more than `max_size`.
    """
    chat = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    if ids.shape[1] > max_size:
        raise UsageError(
            f"the prompt has {ids.shape[1]} tokens, more than max_size={max_size}: "
            f"shorten it or raise --max-size"
        )
    return ids


def generate(model: CompiledModel, ids: Tensor, end_token: int, max_size: int) -> Tensor:
    """`ids` [1, size] and the model's most likely continuation, at most `NEW_TOKENS` long.

    There is no KV cache: each step runs the whole text so far, one token longer than the step
    before it, and so at a size of its own.
    """
    forward = last_logits(model)
    for _ in range(NEW_TOKENS):
        if ids.shape[1] > max_size:
            break
        token = forward(ids).argmax(-1, keepdim=True)  # [1, 1]
        if token.item() == end_token:
            break
        ids = torch.cat([ids, token], dim=1)
    return ids
