"""Random programs of collectives, in the runner and in Python; ranks run them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from splitpoint.compilers.native_steps import piece_steps
from splitpoint.compilers.wrapper import Wrapper, read_wrapper
from splitpoint.graph.stitch import Body, PieceSteps, assemble, rebind
from splitpoint.runtime.native import native
from splitpoint.torch_internals.distributed import group_name

SHOTS = ("one_shot", "two_shot")
Call = Callable[..., tuple[Tensor, ...]]


def wrapper_of(lines: list[str]) -> Wrapper:
    """Of lines over x, residual and weight."""
    body = "\n".join("        " + line for line in lines)
    return read_wrapper(
        "class Runner:\n    def call(self, args):\n        s0, x, residual, weight = args\n"
        f"        args.clear()\n{body}\n"
    )


def both(wrapper: Wrapper, outputs: int) -> tuple[Call, Call]:
    """A function over one piece in Python, and with the runner."""
    data = json.loads(json.dumps(piece_steps(wrapper, takes=["s"])))
    names, made = ["a0", "a1", "a2"], [f"v{i}" for i in range(outputs)]
    call = f"({', '.join(made)},)"
    body = Body(
        ("size", *names),
        (f"{call} = p_0(size, {', '.join(names)})", f"return {call}"),
        {"p_0": wrapper.bind({})},
        (),
        (["piece", "p_0", names, made], None),
        {"p_0": PieceSteps(data, list)},
    )
    fast = native(body)
    assert fast is not None
    functions = assemble(body, None), assemble(body, None, native=fast)
    for each in functions:
        rebind(each, [], None)
    return functions


def fused(x: str, residual: str, algorithm: str = "one_shot") -> str:
    args = f"{x}, {residual}, weight, {group()!r}, 1e-06, 0.0, {algorithm!r}"
    return f"torch.ops.splitpoint.allreduce_rmsnorm.both({args})"


def reduced(x: str) -> str:
    return f"torch.ops.splitpoint.all_reduce.default({x}, group={group()!r})"


def group() -> str:
    assert dist.group.WORLD is not None
    return group_name(dist.group.WORLD)


def random_program(rng: random.Random) -> tuple[list[str], int]:
    """Its lines, with a `del` after each last read as Inductor writes them, and its outputs."""
    values, reads = ["x", "residual"], []
    for index in range(rng.randrange(1, 8)):
        a, b = rng.choice(values[-3:]), rng.choice([*values[-3:], "None"])
        made = [f"n{index}", f"r{index}"][: rng.choice((1, 2, 2))]
        reads.append(([a, b] if len(made) == 2 else [a], made))
        values += made
    outputs = sorted({values[-1], *rng.sample(values, rng.randrange(3))})
    lines = []
    for index, (given, made) in enumerate(reads):
        if len(made) == 2:
            lines.append(f"b{index} = {fused(given[0], given[1], rng.choice(SHOTS))}")
            lines += [f"{name} = b{index}[{at}]" for at, name in enumerate(made)]
            lines.append(f"del b{index}")
        else:
            lines.append(f"{made[0]} = {reduced(given[0])}")
        later = {*outputs, *(name for names, _ in reads[index + 1 :] for name in names)}
        dead = [name for name in dict.fromkeys([*given, *made]) if name not in later]
        lines += [f"del {name}" for name in dead if name != "None"]
    return [*lines, f"return ({', '.join(outputs)},)"], len(outputs)


def compare(seeds: list[int]) -> None:
    """To the bit, with gradients recorded and not, and what is given stays as it is."""
    for seed in seeds:
        rng = random.Random(seed)
        lines, outputs = random_program(rng)
        plain, fast = both(wrapper_of(lines), outputs)
        numbers = torch.Generator().manual_seed(seed + dist.get_rank())
        shape = (rng.choice((1, 3, 40)), rng.choice((5, 64)))
        dtype = rng.choice((torch.bfloat16, torch.float32))
        given = [torch.randn(shape, generator=numbers).to(dtype) for _ in range(2)]
        given.append(torch.randn(shape[1], generator=numbers).to(dtype))
        kept = [each.clone() for each in given]
        with torch.set_grad_enabled(rng.random() < 0.3):
            want, got = plain(shape[0], *given), fast(shape[0], *given)
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b), lines
        assert all(map(torch.equal, given, kept)), lines


def called(lines: list[str], grad: bool = False) -> list[str]:
    """The collectives that a program of the runner calls, in order."""
    _, fast = both(wrapper_of(lines), 1)
    given = [torch.ones(2, 64), torch.ones(2, 64), torch.ones(64)]
    with (
        torch.set_grad_enabled(grad),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        fast(2, *given)
    assert all(torch.equal(each, torch.ones_like(each)) for each in given)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [e.name for e in events if e.name.startswith("splitpoint::")]


def forms() -> None:
    """Over what is read for the last time and is the program's own; nothing else."""
    norm, norm_over = "splitpoint::allreduce_rmsnorm", "splitpoint::allreduce_rmsnorm_"
    plain, plain_over = "splitpoint::all_reduce", "splitpoint::all_reduce_"
    first = [
        f"b = {fused('x', 'residual')}",
        "del x",
        "del residual",
        "n = b[0]",
        "r = b[1]",
        "del b",
    ]
    assert called(
        [
            *first,
            f"y = {reduced('n')}",
            "del n",
            f"c = {fused('y', 'r')}",
            "del y",
            "del r",
            "m = c[0]",
            "del c",
            "return (m,)",
        ]
    ) == [norm, plain_over, norm_over]
    # A value read later, one given twice, and gradients that are recorded.
    later = [
        *first,
        f"c = {fused('n', 'r')}",
        "del n",
        "m = c[0]",
        "del c",
        f"d = {fused('m', 'r')}",
        "del m",
        "del r",
        "k = d[0]",
        "del d",
        "return (k,)",
    ]
    assert called(later) == [norm, norm, norm_over]
    assert called(later, grad=True) == [norm, norm, norm]
    twice = [*first, "del r", f"c = {fused('n', 'n')}", "del n", "k = c[0]", "del c", "return (k,)"]
    assert called(twice) == [norm, norm]
    # A view of what something else still has.
    viewed = [
        f"n = {reduced('x')}",
        "v = reinterpret_tensor(n, (2, 64), (64, 1), 0)",
        f"y = {reduced('v')}",
        "del v",
        f"z = {reduced('n')}",
        "del n",
        "del y",
        "return (z,)",
    ]
    assert called(viewed) == [plain, plain, plain_over]
