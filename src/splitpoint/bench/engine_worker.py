"""One vLLM engine in a process of its own; prints its times as JSON."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..integrations.vllm import KEY
from ..kernels import loaded_library, use_instruction_set
from ..torch_internals.instruction_sets import answer_as_avx2
from .differences import random_prompts

REPEATS = 3


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Time an engine as `task` says, or, with `check` in it, let it answer so many prompts."""
    if task["isa"] == "avx2":
        answer_as_avx2()
        if task["ours"]:
            use_instruction_set("avx2")
    if not task["zentorch"]:
        sys.modules["zentorch"] = None  # type: ignore[assignment]  # vLLM uses it where it is
    from vllm import LLM, SamplingParams, __version__
    from vllm.platforms import current_platform

    if current_platform.is_zen_cpu() != task["zentorch"]:
        raise SystemExit("vLLM uses zentorch on AMD's processors with AVX-512 only")

    asked = {KEY: task["rounding"]} if task["ours"] and task["rounding"] else {}
    most = task["prompt"] + task["tokens"] + 1
    llm = LLM(
        task["folder"],
        dtype=task["dtype"],
        enforce_eager=task["eager"],
        max_model_len=most,
        max_num_batched_tokens=most,
        max_num_seqs=max(task["batches"]),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        additional_config=asked,
    )
    clock: Callable[[], float] = time.process_time if task["threads"] == 1 else time.perf_counter
    numbers = random.Random(0)
    if task["check"]:
        return {**_about(__version__), "seconds": {}, "answers": _answers(llm, task, numbers)}

    def seconds(batch: int, length: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [numbers.randrange(5, 1000) for _ in range(length)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = clock()
        llm.generate(prompts, sampling, use_tqdm=False)
        return clock() - start

    def a_token(batch: int) -> float:
        first, all_ = seconds(batch, 32, 1), seconds(batch, 32, 1 + task["tokens"])
        return (all_ - first) / float(task["tokens"])

    seconds(max(task["batches"]), 32, 4)
    found = {
        f"a token, batch {batch}": statistics.median(a_token(batch) for _ in range(REPEATS))
        for batch in task["batches"]
    }
    found[f"first token of {task['prompt']}"] = statistics.median(
        seconds(1, task["prompt"], 1) for _ in range(REPEATS)
    )
    return {**_about(__version__), "seconds": found}


def _about(version: str) -> dict[str, Any]:
    kernels = loaded_library() is not None
    return {
        "about": {"vllm": version},
        "instruction_set": torch.ops.splitpoint.instruction_set("") if kernels else "",
    }


def _answers(llm: Any, task: dict[str, Any], numbers: random.Random) -> list[dict[str, Any]]:
    """As `differences.Answers`, several at a time."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=task["tokens"], ignore_eos=True, detokenize=False, logprobs=2
    )
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(task["check"], numbers)]
    answers = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        made = output.outputs[0]
        tokens = list(made.token_ids)
        logprobs = [
            (known[token].logprob, max(v.logprob for key, v in known.items() if key != token))
            for token, known in zip(tokens, made.logprobs, strict=True)
        ]
        answers.append({"tokens": tokens, "logprobs": logprobs})
    return answers


if __name__ == "__main__":
    made = main(json.loads(sys.argv[1]))
    print(json.dumps({"seconds": made.pop("seconds"), **made}))  # by its beginning it is found
