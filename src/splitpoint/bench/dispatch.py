"""`splitpoint bench dispatch`: what a call costs beyond the function it is sent to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import Config, compile
from ..graph.pieces import Name
from ..graph.stitch import assemble, rebind, stitch
from ..ranges import align
from ..report.environment import environment
from ..runtime.compiled_model import CompiledModel
from ..tuning.measure import THREAD_CPU_TIME, interleave

PLANS = {
    "1 range": Config(max_size=512, backend="eager"),
    "4 ranges, 8 sizes": Config(
        max_size=512,
        split_points=[8, 64, 256],
        compile_sizes=[1, 2, 4, 16, 32, 100, 128, 300],
        backend="eager",
    ),
    "16 ranges, 51 sizes": Config(
        max_size=8192,
        split_points=list(range(500, 8000, 500)),
        compile_sizes=list(range(1, 52)),
        backend="eager",
    ),
}


class Stack(nn.Module):
    """A model with as many modules and parameters as a decoder of `layers` layers has."""

    def __init__(self, layers: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([*(nn.Linear(width, width, bias=False) for _ in range(7))])
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[size, width] and [size] to [size, width]."""
        for index, linears in enumerate(self.layers):
            x = self.norms[2 * index](x) + positions[:, None]
            for linear in linears:  # type: ignore[attr-defined]
                x = linear(x)
            x = self.norms[2 * index + 1](x)
        return x


@dataclass(frozen=True)
class Row:
    """One plan: medians in microseconds a call of an empty function, by how it is called."""

    plan: str
    ranges: int
    empty_us: float
    """The function alone."""
    lookup_us: float
    """Found in the table, then called."""
    wrapper_us: float
    """Through the whole wrapper: arguments checked, looked up, counted, called."""
    guarded_us: float
    """The same with `module_guards="every_call"`."""

    @property
    def dispatch_us(self) -> float:
        """What the look-up adds to calling the function."""
        return self.lookup_us - self.empty_us


@dataclass(frozen=True)
class DispatchReport:
    """The outcome; `print` it for the table."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """`{"environment": {...}, "rows": [...]}`."""
        rows = [asdict(row) | {"dispatch_us": row.dispatch_us} for row in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=2)

    def __str__(self) -> str:
        heading = ("plan", "empty us", "look-up adds us", "wrapper us", "with module guards us")
        cells = [
            (
                row.plan,
                f"{row.empty_us:.2f}",
                f"{row.dispatch_us:.2f}",
                f"{row.wrapper_us:.2f}",
                f"{row.guarded_us:.2f}",
            )
            for row in self.rows
        ]
        env = self.environment
        return "\n".join(
            [
                f"{env['layers']} layers, {env['parameters']} parameters, {env['clock']}",
                f"torch {env['torch']} on {env['cpu']}",
                "",
                *align([heading, *cells], right={1, 2, 3, 4}),
                "",
                "us a call, medians. The function called is empty; the wrapper binds and checks "
                "two tensors,",
                "looks the size up, counts and calls. Module guards see every change to the module "
                "and to the",
                "globals it reads; caches are warm here, as they are not in a model that has just "
                "read its weights.",
            ]
        )


def run(*, layers: int = 30, budget_s: float = 1.0) -> DispatchReport:
    """Time the ways to an empty function, for plans of several sizes.

    The model is captured but not compiled: what its pieces cost is left out, so that a
    microsecond can be seen. `budget_s` is CPU seconds for each way and plan.
    """
    torch.set_num_threads(1)
    model = Stack(layers).eval().requires_grad_(False)
    rows = tuple(_row(name, model, config, budget_s) for name, config in PLANS.items())
    return DispatchReport(
        environment()
        | {
            "layers": layers,
            "parameters": sum(1 for _ in model.parameters()),
            "threads": 1,
            "clock": THREAD_CPU_TIME.name,
        },
        rows,
    )


def _row(name: str, model: Stack, config: Config, budget_s: float) -> Row:
    x, positions = torch.zeros(33, 8), torch.zeros(33)
    with torch.no_grad():
        bare = _emptied(model, replace(config, module_guards="first_call"), x, positions)
        guarded = _emptied(model, config, x, positions)
        program = bare._program
        table, runners = program.dispatches[0].table, program.runners
        empty = runners[table[33]]
        ways: dict[str, Callable[[], object]] = {
            "empty": partial(empty, 33, x, positions),
            "lookup": lambda: runners[table[33]](33, x, positions),
            "wrapper": lambda: bare(x, positions),
            "guarded": lambda: guarded(x, positions),
        }
        timings = interleave(ways, clock=THREAD_CPU_TIME, budget_s=budget_s)
    us = {way: timing.median_s * 1e6 for way, timing in timings.items()}
    return Row(name, len(bare.plan.ranges), us["empty"], us["lookup"], us["wrapper"], us["guarded"])


def _emptied(
    model: Stack, config: Config, x: torch.Tensor, positions: torch.Tensor
) -> CompiledModel:
    """A compiled model whose functions do nothing but what they check of the module."""
    compiled = compile(model, replace(config, cache_dir=""))
    compiled(x, positions)
    program = compiled._program
    for index, lane in enumerate(program.lanes, 1):
        graph = lane.graph
        nothing = replace(graph.split, steps=(), outputs=(Name(graph.split.inputs[0]),), pieces={})
        guard = None
        if config.module_guards == "every_call":
            guard = program.binding.guard(graph)
        body = stitch(nothing, graph.inputs, {}, graph.argument_count, None)
        function = assemble(body, guard)
        rebind(function, graph.bound, graph.state.held)
        program.runners[index] = function
    return compiled
