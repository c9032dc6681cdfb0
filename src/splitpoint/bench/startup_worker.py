"""One start of a model in a process of its own; prints what it cost as JSON."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from .. import CompiledModel, Config, compile
from ..capture.regions import cover
from ..models.catalogue import DTYPES, load
from ..runtime import compiled_model
from ..runtime.packed_weights import PackedWeights
from ..runtime.program import Program


def cpu_s() -> float:
    """CPU seconds of this process and the children it waited for."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


class _Parts:
    """CPU seconds by part of a start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = cpu_s()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + cpu_s() - start

        return timed


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Start a model as `task` says."""
    torch.set_num_threads(task["threads"])
    config = Config.from_json(json.dumps(task["config"]))
    model, _ = load(
        task["model"], DTYPES[task["dtype"]], layers=task["layers"], random_weights=True
    )
    size = min(5, config.max_size)
    arguments = {
        "input_ids": torch.arange(size)[None],
        "use_cache": False,
        "logits_to_keep": 1,
    }
    before = set(sys.modules)
    if task["way"] == "splitpoint":
        answer = _splitpoint(model, config, arguments)
    else:
        answer = _torch_compile(model, arguments)
    heads = {name.split(".")[0] + "." + name.partition(".")[2].split(".")[0]
             for name in set(sys.modules) - before}  # fmt: skip
    answer["imported"] = sorted(
        head for head in heads if head.startswith(("torch._dynamo", "torch._inductor", "sympy"))
    )
    return answer


def _splitpoint(model: Any, config: Config, arguments: dict[str, Any]) -> dict[str, Any]:
    parts = _Parts()
    compiled = compile(model, config, dynamic_dims={"input_ids": 1})
    with (
        patch.object(compiled_model, "cover", parts.around("capture", cover)),
        patch.object(Program, "compile_all", parts.around("compile", Program.compile_all)),
        patch.object(PackedWeights, "_add", parts.around("pack", PackedWeights._add)),
        patch.object(CompiledModel, "_start", parts.around("start", CompiledModel._start)),
    ):
        start = cpu_s()
        compiled(**arguments)
        whole = cpu_s() - start
    seconds = {name: parts.seconds.get(name, 0.0) for name in ("capture", "compile", "pack")}
    if seconds["compile"]:
        seconds["compile"] -= seconds["pack"]  # packing happens inside
    seconds["load"] = parts.seconds["start"] - sum(seconds.values())
    seconds["first_call"] = whole - parts.seconds["start"]
    stats = compiled.stats()
    return {
        "startup": whole - seconds["pack"],
        "parts": seconds,
        "ranges": len(compiled.plan.ranges),
        "pieces": stats.pieces,
        "unique_pieces": stats.unique_pieces,
        "packed_bytes": stats.packed_bytes,
        "mapped_bytes": stats.mapped_bytes,
    }


def _torch_compile(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    compiled: Any = torch.compile(model, dynamic=True)
    start = cpu_s()
    with torch.no_grad():
        compiled(**arguments)
    whole = cpu_s() - start
    parts = dict.fromkeys(("capture", "load", "pack", "first_call"), 0.0)
    return {"startup": whole, "parts": {**parts, "compile": whole}}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
