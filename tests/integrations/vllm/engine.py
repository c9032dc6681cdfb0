"""One vLLM engine in a process of its own: prints what it answered, and with what, as JSON.

python -m tests.integrations.vllm.engine '{"model": FOLDER, "before": "CODE", "llm": {...}}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPTS = [[1, 5, 9, 2, 77, 31, 8, 4], [3] * 40, [7, 100, 23]]
"""The second is longer than what tests let this package's kernels take."""


def main(task: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    exec(task.get("before", ""))
    llm = LLM(
        task["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=4,
        enable_prefix_caching=False,
        **{"enforce_eager": True, **task.get("llm", {})},
    )
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": each} for each in PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    layers = []
    if "tensor_parallel_size" not in task.get("llm", {}):  # else they are in other processes
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        layers = [module for module in model.modules() if hasattr(module, "cpu_linear")]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "kernels": [getattr(_type(layer.cpu_linear), "__module__", "") for layer in layers],
        "freed": [layer.weight.numel() == 0 for layer in layers],
        "imported": sorted(name for name in sys.modules if name.startswith("splitpoint")),
    }


def _type(called: Any) -> Any:
    return called if hasattr(called, "__code__") else type(called)


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(main(task)), flush=True)
    exec(task.get("after", ""))
