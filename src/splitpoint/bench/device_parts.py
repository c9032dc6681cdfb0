"""The parts of `bench.device`: each says what it finds as it finds it, in an order that leaves the
most useful rows where it is cut."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..api import compile
from ..config import Config
from ..errors import SplitpointError
from ..kernels.devices import device_row
from ..report.environment import environment
from .device_model import LLAMA_1B, TINY, Shape, llama, median_ms, synchronize

Say = Callable[..., None]

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ImportError, SplitpointError)
"""What an entrant may fail with while others go on: all of torch's are among them."""


@dataclass(frozen=True)
class Task:
    """What a part is to run on, and for how long."""

    device: torch.device
    quick: bool
    layers: int
    end: float
    """On `time.monotonic`'s clock: nothing new is begun after it."""
    out: Path
    """The folder for results."""
    store: Path
    """That of the store, which parts share."""

    @property
    def shape(self) -> Shape:
        """Of the model."""
        of = TINY if self.quick else LLAMA_1B
        return Shape(of.hidden, of.heads, of.kv_heads, of.ffn, min(self.layers, of.layers))

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return torch.bfloat16

    def inputs(self, size: int) -> Tensor:
        """[size, hidden]."""
        shape = size, self.shape.hidden
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)

    @property
    def is_over(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() >= self.end


def _config(task: Task, max_size: int, **more: Any) -> Config:
    points = [n for n in (16, 64, 512) if n < max_size]
    given: dict[str, Any] = {"max_size": max_size, "split_points": points}
    if task.quick:  # what is measured there says nothing, so kernels are not measured either
        given |= {"linear": "inductor", "attention": "torch"}
    # What one part has compiled the next one need not.
    given |= {"compile_sizes": [1], "cache_dir": str(task.store), **more}
    return Config(**given)


def _graphs(task: Task, sizes: Sequence[int]) -> dict[str, Any]:
    if device_row(task.device).graphs is None:
        return {}
    return {"cudagraph_capture_sizes": list(sizes)}


# --- parts -----------------------------------------------------------------------------


def what_is_there(task: Task, say: Say) -> None:
    """Versions, the device, and what its memory and arithmetic allow."""
    row = dict(environment())
    for name in ("triton", "transformers"):
        try:
            row[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            row[name] = None
    if (identity := device_row(task.device).identity) is not None:
        row |= identity(task.device)
    say(**row)
    size = 2**20 if task.quick else 2**30
    memory = torch.zeros(size, dtype=torch.int32, device=task.device)
    ms = median_ms({"read": memory.sum}, task.device, 10)["read"]
    say(read_GB_s=round(memory.nbytes / ms / 1e6, 1))
    n = 256 if task.quick else 8192
    matrix = torch.randn(n, n, device=task.device).to(task.dtype)
    ms = median_ms({"mm": lambda: matrix @ matrix}, task.device, 10)["mm"]
    say(gemm_TFLOP_s=round(2 * n**3 / ms / 1e9, 3))


def examples(task: Task, say: Say) -> None:
    """The README's first example."""
    layers = nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)
    model = nn.Sequential(*layers).eval().requires_grad_(False).to(task.device)
    compiled = compile(model, _config(task, 512, split_points=[64] if task.quick else [8, 64]))
    for size in (1, 5, 200, 1, 64):
        x = torch.randn(size, 64, device=task.device)
        say(size=size, max_error=(compiled(x) - model(x)).abs().max().item())
    say(plan=str(compiled.plan).splitlines(), stats=str(compiled.stats()).splitlines())


def ranges(task: Task, say: Say) -> None:
    """Results at sizes around the ends of ranges, against eager and fp32; then with other weights,
    and for earlier results after later calls."""
    model = llama(task.shape, task.device, task.dtype)
    exact = llama(task.shape, task.device, torch.float32)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    sizes = (1, 2, 7, 8, 9, 64) if task.quick else (1, 2, 7, 8, 9, 64, 512, 2048)
    graphs = _graphs(task, (2, 8, 64))
    compiled = compile(model, _config(task, max(sizes), split_points=[8], **graphs))
    kept: list[tuple[Tensor, Tensor]] = []
    for again in (False, True):
        for size in sizes:
            x = task.inputs(size)
            got, plain, right = compiled(x), model(x), exact(x.float())
            kept.append((got, got.clone()))
            ours, eagers = ((each.float() - right).abs().max().item() for each in (got, plain))
            close = ours <= 2 * eagers + 1e-3
            say(size=size, again=again, error=ours, error_of_eager=eagers, right=close)
        with torch.no_grad():
            for module in (model, exact):
                next(module.parameters()).mul_(0.5)  # in place, which replays have to see
    unchanged = all(torch.equal(result, then) for result, then in kept)
    say(earlier_results_unchanged=unchanged, plan=str(compiled.plan).splitlines())
    if not graphs or task.is_over:
        return
    padded = compile(model, _config(task, 64, **graphs, pad_to_captured=True))
    for size in (2, 3, 5, 8, 33, 64):
        x = task.inputs(size)
        error = (padded(x).float() - model(x).float()).abs().max().item()
        say(size=size, padded=True, max_error=error, replays=padded.stats().replays)
    say(notes=list(padded.plan.notes))


def _own_code(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """The model under code of its own, so that Dynamo's limit of recompiles counts it apart."""

    def forward(x: Tensor) -> Tensor:
        result: Tensor = model(x)
        return result

    code = forward.__code__.replace(co_name=name)
    return types.FunctionType(code, forward.__globals__, name, None, forward.__closure__)


def _entrants(task: Task, model: nn.Module, sizes: Sequence[int]) -> Mapping[str, Any]:
    """By name what makes the function for a size."""
    dynamic = torch.compile(_own_code(model, "dynamic"), dynamic=True)
    ours = compile(model, _config(task, max(sizes), cudagraph_capture_sizes=[]))
    found: dict[str, Callable[[int], Callable[[Tensor], Any]]] = {
        "eager": lambda size: model,
        "splitpoint": lambda size: ours,
        "torch.compile(dynamic=True)": lambda size: dynamic,
    }
    if graphs := _graphs(task, [n for n in sizes if n <= 256]):
        recorded = compile(model, _config(task, max(sizes), **graphs))
        tuned = compile(
            model,
            _config(
                task,
                max(sizes),
                linear={f"1-{max(sizes)}": "autotuned"},
                **graphs,
            ),
        )
        overhead = torch.compile(_own_code(model, "overhead"), dynamic=True, mode="reduce-overhead")
        found |= {
            "splitpoint, recorded": lambda size: recorded,
            "reduce-overhead": lambda size: overhead,
            "splitpoint, recorded, autotuned": lambda size: tuned,
            "max-autotune": lambda size: torch.compile(
                _own_code(model, f"tuned{size}"), dynamic=False, mode="max-autotune"
            ),
        }
    return found


def speed(task: Task, say: Say) -> None:
    """Milliseconds a call, size by size: alone as each is ready, then all in turns."""
    model = llama(task.shape, task.device, task.dtype)
    weights = sum(each.nbytes for each in model.parameters())
    sizes = (1, 4, 16) if task.quick else (1, 16, 256, 4, 64, 4096, 1024)
    rounds = 5 if task.quick else 30
    made = _entrants(task, model, sizes)
    say(weights_MB=round(weights / 1e6), layers=task.shape.layers)
    with torch.no_grad():
        for size in sizes:
            x, ready = task.inputs(size), {}
            wanted = model(x).float()
            for name, make in made.items():
                if task.is_over:
                    say(left_out=name, size=size)
                    continue
                start = time.monotonic()
                try:
                    call = make(size)
                    for _ in range(3):  # reduce-overhead records at the second
                        result = call(x)
                    error = (result.float() - wanted).abs().max().item()
                    took = time.monotonic() - start
                    ready[name] = functools.partial(call, x)
                    ms = median_ms({name: ready[name]}, task.device, rounds)[name]
                except FAILURES as why:
                    ready.pop(name, None)
                    say(entrant=name, size=size, failed=_said(why))
                    continue
                say(entrant=name, size=size, alone_ms=ms, ready_s=took, max_error=error)
            if len(ready) > 1 and not task.is_over:
                say(size=size, in_turns_ms=median_ms(ready, task.device, rounds))


def launches(task: Task, say: Say) -> None:
    """What a call asks the device to do."""
    model = llama(task.shape, task.device, task.dtype)
    sizes = (4,) if task.quick else (1, 4)
    made = _entrants(task, model, (1, 4, 16) if task.quick else (1, 16, 4096))
    for name, make in list(made.items())[: 2 if task.quick else None]:
        for size in sizes:
            if task.is_over:
                return say(left_out=name, size=size)
            try:
                with torch.no_grad():
                    say(entrant=name, size=size, **_launches(make(size), task, size))
            except FAILURES as why:
                say(entrant=name, size=size, failed=_said(why))
    return None


def _launches(call: Callable[[Tensor], Any], task: Task, size: int) -> dict[str, Any]:
    x = task.inputs(size)
    for _ in range(4):
        call(x)
    synchronize(task.device)
    activities = [ProfilerActivity.CPU]
    if task.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        call(x)
        synchronize(task.device)
    counts: dict[str, int] = {}
    for each in found.key_averages():
        kind = "operators" if each.key.startswith("aten::") else None
        if "LaunchKernel" in each.key or "GraphLaunch" in each.key:
            kind = each.key
        if kind is not None:
            counts[kind] = counts.get(kind, 0) + each.count
    return {"launches": counts}


def starts(task: Task, say: Say) -> None:
    """A start with nothing kept, and one with all kept, each in a process of its own."""
    store = task.store / "of-starts"
    for start in ("cold", "warm"):
        left = task.end - time.monotonic()
        if left < 5:
            return say(left_out=start)
        command = [*(sys.executable, "-m", "splitpoint.bench.device", "--part", "start")]
        command += ["--device", str(task.device), "--out", str(task.out)]
        command += ["--layers", str(task.layers), "--seconds", str(left), "--start", start]
        command += ["--store", str(store)] + ["--quick"] * task.quick
        try:
            subprocess.run(command, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return say(start=start, cut_after_s=round(left))
    return None


def start(task: Task, say: Say, which: str) -> None:
    """One start: from the model in memory to its first result."""
    model = llama(task.shape, task.device, task.dtype)
    x = task.inputs(4)
    synchronize(task.device)
    before = time.monotonic()
    compiled = compile(model, _config(task, 16 if task.quick else 64))
    compiled(x)
    synchronize(task.device)
    took, stats = time.monotonic() - before, compiled.stats()
    say(
        start=which,
        seconds=took,
        compilations=stats.compilations,
        loads=stats.loads,
        captures=stats.captures,
    )


def _said(why: BaseException) -> str:
    return f"{type(why).__name__}: {str(why).strip()[:300]}"


PARTS: Mapping[str, tuple[Callable[[Task, Say], None], float]] = {
    "environment": (what_is_there, 30),
    "examples": (examples, 60),
    "ranges": (ranges, 90),
    "speed": (speed, 210),
    "launches": (launches, 45),
    "starts": (starts, 60),
}
"""By name, in order: what is run, and the seconds it may take. 8 minutes in all, starts of
processes included."""
