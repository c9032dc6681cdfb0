"""`splitpoint bench forward`: eager, torch.compile(dynamic=True), splitpoint and others, side
by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .. import CompiledModel, Config, kernels
from ..config import Activations
from ..errors import KernelBuildError, UsageError
from ..report.environment import environment
from ..torch_internals.inductor import fresh_inductor_cache
from ..tuning.measure import Clock, Timing, clock_for, interleave
from .baseline import Setting
from .baselines import BASELINES
from .check import Expected
from .cost import Cost, cost_of
from .entrants import ONLY, Entrants, Say, compile_cold
from .floor import Probes, Rates, Work, work_of
from .forward_report import Floor, ForwardReport, Measured, Row, variant_of
from .inputs import Forward, call_each, last_logits, random_ids


def run(
    model: Any,
    name: str,
    config: Config,
    *,
    sizes: Sequence[int],
    threads: int = 1,
    budget_s: float = 1.0,
    singles: bool = False,
    baselines: Sequence[str] = (),
    say: Say = lambda line: None,
) -> ForwardReport:
    """Compare eager, `torch.compile(dynamic=True)` and splitpoint on one model.

    All get the same inputs: random ids of a fixed seed, [1, size], no KV cache. No output is
    timed that was not checked. `budget_s` is the time (seconds on the clock in use) given to
    each at each size. With `singles`, splitpoint is compiled once more for every kernel that
    can serve all sizes, with that kernel and one range. `baselines` names what else to compare
    with (`BASELINES`); one that is not installed is noted in the report. Sets torch's thread
    count to `threads` for the whole process. What goes on is told to `say`, one line at a time.

    Raises:
        UsageError: for sizes that the plan does not serve, or a baseline that there is not.
        OutputMismatch: when a compiled model's output differs from eager's.
    """
    check_sizes(sizes, config)
    check_baselines(baselines)
    start_up(threads)
    compiled, cost = compile_splitpoint(model, config, sizes, say)
    return compare(
        model,
        name,
        compiled,
        cost,
        sizes=sizes,
        threads=threads,
        budget_s=budget_s,
        singles=singles,
        baselines=baselines,
        say=say,
    )


def check_sizes(sizes: Sequence[int], config: Config) -> None:
    """Raises `UsageError` for a size outside [1, max_size], before any work is done."""
    outside = [size for size in sizes if not 1 <= size <= config.max_size]
    if outside or not sizes:
        raise UsageError(
            f"sizes must be from 1 to max_size={config.max_size}, got "
            f"{', '.join(map(str, outside)) or 'none'}: change --sizes or --max-size"
        )


def check_baselines(names: Sequence[str]) -> None:
    """Raises `UsageError` for a baseline that there is not."""
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise UsageError(
            f"there is no baseline {', '.join(map(repr, unknown))}: choose from "
            f"{', '.join(BASELINES)}"
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
    say(f"splitpoint: compiling {len(config.plan().entries)} ranges ...")
    torch.compiler.reset()
    return compile_cold(model, config, sizes)


# --- the comparison --------------------------------------------------------------------


def compare(
    model: Any,
    name: str,
    compiled: CompiledModel,
    cost: Cost,
    *,
    sizes: Sequence[int],
    threads: int,
    budget_s: float,
    singles: bool = False,
    baselines: Sequence[str] = (),
    say: Say,
) -> ForwardReport:
    """As `run`, with a model that `compile_splitpoint` has compiled."""
    say("running the model in fp32, to check outputs ...")
    expected = Expected(model, sizes)
    entrants = Entrants(expected, {"eager": last_logits(model)})
    entrants.errors["eager"] = expected.eager_error
    weights, activations = compiled.config.weights, compiled.config.activations
    work = {size: work_of(model, size, weights) for size in sizes}

    say("torch.compile(dynamic=True): compiling ...")
    # fullgraph, so that a recompilation limit is an error here and not a quiet fall back to
    # eager. Two graphs are expected: Dynamo takes size 1 for a constant.
    reference = last_logits(torch.compile(model, dynamic=True, fullgraph=True))
    with fresh_inductor_cache():
        _, entrants.costs["torch.compile"] = cost_of(lambda: call_each(reference, sizes))
    entrants.forwards["torch.compile"] = entrants.add("torch.compile", reference)
    entrants.costs["splitpoint"] = cost
    if weights or activations:
        what = f"weights in {weights}" if weights else "its own weights"
        say(f"running it with {what} in fp32, to check splitpoint's ...")
        rounded = Entrants(Expected(model, sizes, weights, activations), {})
        entrants.forwards["splitpoint"] = rounded.add("splitpoint", last_logits(compiled))
        entrants.errors |= rounded.errors
        entrants.notes.append(
            f"splitpoint has {what}, the others as they are unless it is said of them; its outputs "
            f"were compared with those of the model with such weights."
        )
        if activations:
            entrants.notes.append(
                f"it has activations in {activations} where the plan says so, and may be off by "
                f"what they make of the model if all layers have them."
            )
    else:
        entrants.forwards["splitpoint"] = entrants.add("splitpoint", last_logits(compiled))
    if singles:
        entrants.add_singles(model, compiled.config, sizes, say)
    setting = Setting(model, name, weights, activations, threads)
    entrants.add_baselines(setting, baselines, sizes, say)

    most = max(each.weight_bytes for each in work.values())
    probes = _probes(model, most, activations, entrants)
    clock = clock_for(threads)
    dtype = _dtype_name(model)
    timings: dict[int, dict[str, Timing]] = {}
    for size in sizes:
        built = entrants.built_for(size, say)
        say(f"timing size {size} ...")
        forwards: dict[str, Forward] = {**entrants.forwards, **built}
        timings[size] = _time(forwards, probes, model, size, clock, budget_s)
        entrants.release(built)
    rates = None
    if probes is not None:
        # What rounds its weights otherwise may have less to read.
        whole = {name for size in sizes for name in timings[size]} & {*entrants.whole}
        rates = _rates(probes, work, timings, whole)
    rows = []
    for size in sizes:
        floor = None
        if rates is not None:
            ms = work[size].floor_s(rates) * 1e3
            floor = Floor(ms, rates.bytes_s / 1e9, rates.flops_s / 1e9)
        variant = variant_of(compiled.plan.entry_for(size))
        rows.append(_row(size, dtype, threads, variant, floor, timings[size], baselines))
    return ForwardReport(
        environment=environment()
        | {
            "model": name,
            "dtype": dtype,
            "threads": threads,
            "clock": clock.name,
            "budget_s": budget_s,
            "first_calls": {name: asdict(cost) for name, cost in entrants.costs.items()},
            "output_error": entrants.errors,
            "notes": entrants.notes,
            "plan": json.loads(compiled.plan.to_json()),
        },
        rows=tuple(rows),
        plan=compiled.plan,
    )


def _rates(
    probes: Probes,
    work: Mapping[int, Work],
    timings: Mapping[int, Mapping[str, Timing]],
    passes: Collection[str],
) -> Rates:
    """The best rates that were seen at any size, by probes and by `passes`."""
    rates = Rates(0.0, 0.0)
    for found in timings.values():
        rates = rates.best_of(probes.rates(found))
    for size, found in timings.items():
        fastest = min(found[name].best_s for name in passes if name in found)
        rates = rates.raised_by(work[size], fastest)
    return rates


def _probes(
    model: Any, read_bytes: int, activations: Activations | None, entrants: Entrants
) -> Probes | None:
    try:
        return Probes(model.dtype, read_bytes, activations)
    except KernelBuildError as error:
        entrants.notes.append(f"There is no floor, as memory cannot be read: {error}.")
        return None


def _time(
    forwards: Mapping[str, Forward],
    probes: Probes | None,
    model: Any,
    size: int,
    clock: Clock,
    budget_s: float,
) -> dict[str, Timing]:
    ids = random_ids(model.config.vocab_size, size)
    calls: dict[str, Callable[[], object]] = {
        name: _bind(forward, ids) for name, forward in forwards.items()
    }
    if probes is not None:
        calls |= probes.calls()
    # All were called at this size when they were checked: a slow one, such as bfloat16 that torch
    # emulates, has one call to see how slow, and then no more than fit its budget.
    return interleave(calls, clock=clock, budget_s=budget_s, warm_up=0)


def _bind(forward: Forward, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: forward(ids)


def _row(
    size: int,
    dtype: str,
    threads: int,
    variant: str,
    floor: Floor | None,
    timings: Mapping[str, Timing],
    baselines: Sequence[str],
) -> Row:
    measured = {
        name: Measured(timing.median_s * 1e3, timing.spread, timing.repeats)
        for name, timing in timings.items()
    }
    return Row(
        size=size,
        dtype=dtype,
        threads=threads,
        variant=variant,
        eager=measured["eager"],
        torch_compile=measured["torch.compile"],
        splitpoint=measured["splitpoint"],
        floor=floor,
        singles={
            name.removeprefix(ONLY): one for name, one in measured.items() if name.startswith(ONLY)
        },
        baselines={name: measured[name] for name in baselines if name in measured},
    )


def _dtype_name(model: Any) -> str:
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    return short.get(model.dtype, str(model.dtype).removeprefix("torch."))
