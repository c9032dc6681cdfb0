"""`splitpoint bench forward`: eager, torch.compile(dynamic=True) and splitpoint, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import CompiledModel, Config, compile, kernels
from .._torch import fresh_inductor_cache
from ..errors import UsageError
from ..ranges import Plan, align
from ..tuning.measure import Clock, Timing, clock_for, interleave
from .check import check
from .cost import Cost, cost_of
from .environment import environment
from .inputs import Forward, last_logits, random_ids

Say = Callable[[str], None]

NOISY = 0.2
"""An interquartile spread above which a median of a few repeats tells little."""


@dataclass(frozen=True)
class Row:
    """One size: medians in milliseconds a call, and their spreads (see `Timing.spread`)."""

    size: int
    dtype: str
    threads: int
    eager_ms: float
    torch_compile_ms: float
    splitpoint_ms: float
    ratio: float
    """torch_compile_ms over splitpoint_ms: above 1, splitpoint is the faster."""
    eager_spread: float
    torch_compile_spread: float
    splitpoint_spread: float


@dataclass(frozen=True)
class ForwardReport:
    """The outcome of a comparison; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    plan: Plan
    """The ranges splitpoint ended up with; the same ones are in `environment["plan"]`."""

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`."""
        return json.dumps(
            {"environment": self.environment, "rows": [asdict(row) for row in self.rows]}, indent=2
        )

    def setting(self) -> str:
        """Model, dtype and threads, in a few words."""
        env = self.environment
        threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
        return f"{env['model']}, {env['dtype']}, {threads}"

    def table(self) -> list[str]:
        """The rows alone, aligned."""
        heading = ("size", "eager ms", "torch.compile ms", "splitpoint ms", "ratio")
        cells = [
            (
                str(row.size),
                f"{row.eager_ms:.2f}",
                f"{row.torch_compile_ms:.2f}",
                f"{row.splitpoint_ms:.2f}",
                f"{row.ratio:.2f}x",
            )
            for row in self.rows
        ]
        return align([heading, *cells], right=range(len(heading)))

    def _noise(self) -> str:
        widest = {
            row.size: max(row.eager_spread, row.torch_compile_spread, row.splitpoint_spread)
            for row in self.rows
        }
        noisy = [str(size) for size, spread in widest.items() if spread > NOISY]
        text = f"Widest interquartile spread {max(widest.values()):.0%}"
        if noisy:
            text += f"; over {NOISY:.0%} at {', '.join(noisy)}: measure these on an idle machine"
        return text + "."

    def __str__(self) -> str:
        env = self.environment
        compiled = env["first_calls"]
        return "\n".join(
            [
                f"{self.setting()}, {env['clock']}",
                f"torch {env['torch']} on {env['cpu']} ({env['cpu_capability']})",
                "",
                *self.table(),
                "",
                "ms a call, medians; ratio = torch.compile / splitpoint.",
                self._noise(),
                "Cold compile, with the first call at each size, CPU s (wall s): "
                + ", ".join(
                    f"{name} {cost['cpu_s']:.0f} ({cost['wall_s']:.0f})"
                    for name, cost in compiled.items()
                )
                + f"; splitpoint has {len(self.plan.entries)} ranges.",
            ]
        )


def run(
    model: Any,
    name: str,
    config: Config,
    *,
    sizes: Sequence[int],
    threads: int = 1,
    budget_s: float = 1.0,
    say: Say = lambda line: None,
) -> ForwardReport:
    """Compare eager, `torch.compile(dynamic=True)` and splitpoint on one model.

    All three get the same inputs: random ids of a fixed seed, [1, size], no KV cache. Every
    output is checked before anything is timed. `budget_s` is the time (seconds on the clock
    in use) given to each of the three at each size. Sets torch's thread count to `threads`
    for the whole process. What goes on is told to `say`, one line at a time.

    Raises:
        UsageError: for sizes that the plan does not serve.
        OutputMismatch: when a compiled model's output differs from eager's.
    """
    check_sizes(sizes, config)
    start_up(threads)
    compiled, cost = compile_splitpoint(model, config, sizes, say)
    return compare(
        model, name, compiled, cost, sizes=sizes, threads=threads, budget_s=budget_s, say=say
    )


def check_sizes(sizes: Sequence[int], config: Config) -> None:
    """Raises `UsageError` for a size outside [1, max_size], before any work is done."""
    outside = [size for size in sizes if not 1 <= size <= config.max_size]
    if outside or not sizes:
        raise UsageError(
            f"sizes must be from 1 to max_size={config.max_size}, got "
            f"{', '.join(map(str, outside)) or 'none'}: change --sizes or --max-size"
        )


def start_up(threads: int) -> None:
    """Set the thread count and pay what the first compilation of a process costs.

    Inductor's imports, worker pool and precompiled header come once for a process, and this
    package's C++ kernels once for a machine; whoever compiled first would be charged for them.
    """
    torch.set_num_threads(threads)
    kernels.available()
    torch.compiler.reset()
    with fresh_inductor_cache(), torch.no_grad():
        torch.compile(lambda x: torch.nn.functional.silu(x) * 2)(torch.randn(33, 57))


def compile_splitpoint(
    model: Any, config: Config, sizes: Sequence[int], say: Say
) -> tuple[CompiledModel, Cost]:
    """Compile every range from an empty cache, and call it once at each size."""
    config = replace(config, cache_dir="")
    say(f"splitpoint: compiling {len(Plan.from_config(config).entries)} ranges ...")
    torch.compiler.reset()
    compiled = compile(model, config, dynamic_dims={"input_ids": 1})
    with fresh_inductor_cache():
        _, cost = cost_of(lambda: call_each(last_logits(compiled), sizes))
    return compiled, cost


def compare(
    model: Any,
    name: str,
    compiled: CompiledModel,
    cost: Cost,
    *,
    sizes: Sequence[int],
    threads: int,
    budget_s: float,
    say: Say,
) -> ForwardReport:
    """As `run`, with a model that `compile_splitpoint` has compiled."""
    say("torch.compile(dynamic=True): compiling ...")
    # fullgraph, so that a recompilation limit is an error here and not a quiet fall back to
    # eager. Two graphs are expected: Dynamo takes size 1 for a constant.
    reference = torch.compile(model, dynamic=True, fullgraph=True)
    with fresh_inductor_cache():
        _, reference_cost = cost_of(lambda: call_each(last_logits(reference), sizes))

    forwards = {
        "eager": last_logits(model),
        "torch.compile": last_logits(reference),
        "splitpoint": last_logits(compiled),
    }
    say("checking outputs ...")
    errors = check(model, forwards, sizes)
    clock = clock_for(threads)
    dtype = _dtype_name(model)
    rows = []
    for size in sizes:
        say(f"timing size {size} ...")
        rows.append(_row(size, dtype, threads, _time(forwards, model, size, clock, budget_s)))
    return ForwardReport(
        environment=environment()
        | {
            "model": name,
            "dtype": dtype,
            "threads": threads,
            "clock": clock.name,
            "budget_s": budget_s,
            "first_calls": {
                "torch.compile": asdict(reference_cost),
                "splitpoint": asdict(cost),
            },
            "output_error": errors,
            "plan": json.loads(compiled.plan.to_json()),
        },
        rows=tuple(rows),
        plan=compiled.plan,
    )


def call_each(forward: Forward, sizes: Sequence[int]) -> None:
    """Call once at each size, the largest first: a graph made at 1 would be for 1 only."""
    for size in sorted(sizes, reverse=True):
        # Every vocabulary has id 0, and what the ids are does not change what is compiled.
        forward(torch.zeros(1, size, dtype=torch.int64))


def _time(
    forwards: dict[str, Forward], model: Any, size: int, clock: Clock, budget_s: float
) -> dict[str, Timing]:
    ids = random_ids(model.config.vocab_size, size)
    calls = {name: _bind(forward, ids) for name, forward in forwards.items()}
    return interleave(calls, clock=clock, budget_s=budget_s)


def _bind(forward: Forward, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: forward(ids)


def _row(size: int, dtype: str, threads: int, timings: dict[str, Timing]) -> Row:
    eager, reference, ours = (timings[n] for n in ("eager", "torch.compile", "splitpoint"))
    return Row(
        size=size,
        dtype=dtype,
        threads=threads,
        eager_ms=eager.median_s * 1e3,
        torch_compile_ms=reference.median_s * 1e3,
        splitpoint_ms=ours.median_s * 1e3,
        ratio=reference.median_s / ours.median_s,
        eager_spread=eager.spread,
        torch_compile_spread=reference.spread,
        splitpoint_spread=ours.spread,
    )


def _dtype_name(model: Any) -> str:
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    return short.get(model.dtype, str(model.dtype).removeprefix("torch."))
