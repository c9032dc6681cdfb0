"""What ranks run in tests of the plain collectives and of the operators as torch sees them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from splitpoint.collectives import ops, reference
from splitpoint.torch_internals.distributed import group_name
from tests.collectives.cases import Case, call, make


def name() -> str:
    return group_name(dist.group.WORLD)


def copy_past_caches(value: bool) -> None:
    torch.ops.splitpoint.shm_copy_past_caches(name(), value)


def set_threads(count: int) -> None:
    torch.set_num_threads(count)


def check(seed: int, columns: int) -> None:
    """All-reduce, reduce-scatter and all-gather against float64, each rank knowing all inputs."""
    splitpoint = torch.ops.splitpoint
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for dtype in reference.DTYPES:
        rng = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(2 * ranks, columns, generator=rng).to(dtype) for _ in range(ranks)]
        mine = inputs[rank].clone()
        exact = torch.stack(inputs).double().sum(0)
        magnitude = torch.stack(inputs).double().abs().sum(0)
        allowed = (torch.finfo(dtype).eps / 2 + ranks * 2.0**-24) * magnitude * 1.01 + 1e-37
        whole = []
        for algorithm in ("one_shot", "two_shot", "auto"):
            got = splitpoint.all_reduce(mine, group=name(), algorithm=algorithm)
            assert torch.all((got.double() - exact).abs() <= allowed), (dtype, algorithm)
            whole.append(got)
            over = mine.clone()
            splitpoint.all_reduce_(over, group=name(), algorithm=algorithm)
            whole.append(over)
        assert all(torch.equal(each, whole[0]) for each in whole)
        share = splitpoint.reduce_scatter(mine, group=name())
        assert torch.equal(share, whole[0][2 * rank : 2 * rank + 2])
        assert torch.equal(splitpoint.all_gather(mine, group=name()), torch.cat(inputs))
        assert torch.equal(mine, inputs[rank])
        turned = mine.t()  # not contiguous
        assert torch.equal(splitpoint.all_reduce(turned, group=name()), whole[0].t())
    numbers = torch.arange(columns) + rank
    gathered = splitpoint.all_gather(numbers, group=name())
    assert torch.equal(gathered, torch.cat([torch.arange(columns) + each for each in range(ranks)]))


def fused(x: Tensor, residual: Tensor | None, **more: Any) -> reference.Fused:
    weight = torch.ones(x.shape[-1])
    return reference.Fused(
        *torch.ops.splitpoint.allreduce_rmsnorm(
            x, residual, weight, None, group=name(), eps=1e-6, **more
        )
    )


def empty() -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in fused(torch.empty(0, 64), None)]


def nan() -> bool:
    """A NaN on one rank is a NaN in its row on all ranks, and in no other row."""
    x = torch.ones(3, 64)
    if dist.get_rank() == 1:
        x[1, 5] = torch.nan
    got = fused(x, None, quant="fp8_token")
    rows = got.norm.isnan().all(1).tolist(), got.quantised.float().isnan().all(1).tolist()
    return rows == ([False, True, False],) * 2 and bool(got.scales[1].isnan())


def counted_while_waiting() -> int:
    """How far another thread counts while this one waits for the other rank, for half a second."""
    counted = 0
    done = threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.is_set():
            counted += 1

    if dist.get_rank() == 1:
        time.sleep(0.5)
    thread = threading.Thread(target=count)
    before = counted
    if dist.get_rank() == 0:
        thread.start()
    try:
        fused(torch.ones(2, 64), None)
    finally:
        done.set()
    return counted - before if dist.get_rank() == 0 else 1 << 30


def moved(rows: int, hidden: int, dtype: torch.dtype) -> None:
    """The floor's data movement: the exclusive or of the inputs and the residual."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rng = torch.Generator().manual_seed(rows * hidden)
    given = [torch.randn(rows, hidden, generator=rng).to(dtype) for _ in range(world + 1)]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for residual in (given[-1].clone(), None):
        x = given[rank].clone()
        torch.ops.splitpoint.shm_move_(x, residual, name())
        expected = torch.zeros(rows, hidden, dtype=bits)
        for each in given if residual is not None else given[:-1]:
            expected ^= each.view(bits)
        assert torch.equal(x.view(bits), expected)
        assert residual is None or torch.equal(residual.view(bits), expected)


def opcheck() -> None:
    x, residual = torch.randn(5, 64).bfloat16(), torch.randn(5, 64)
    weight, scale = torch.randn(64), torch.tensor(0.5)
    settings: dict[str, Any] = {"group": name(), "eps": 1e-6}
    packets = torch.ops.splitpoint
    for quant in reference.QUANTS:
        given = scale if quant in ("fp8_static", "nvfp4") else None
        torch.library.opcheck(
            packets.allreduce_rmsnorm.default,
            (x, residual, weight, given),
            settings | {"quant": quant},
        )
    for residual_given in (residual, None):
        torch.library.opcheck(
            packets.allreduce_rmsnorm.both,
            (x, residual_given, weight, name(), 1e-6, 1.0, "one_shot"),
        )
        torch.library.opcheck(
            packets.allreduce_rmsnorm_.default,
            (x.clone(), None if residual_given is None else residual.clone(), weight),
            settings,
        )
    for packet in (packets.all_reduce, packets.reduce_scatter, packets.all_gather):
        torch.library.opcheck(packet.default, (torch.randn(4, 6),), {"group": name()})
    torch.library.opcheck(packets.all_reduce_.default, (torch.randn(4, 6),), {"group": name()})


def compiled() -> None:
    """In one compiled graph with a dynamic size, functional and in place."""
    group = name()
    weight = torch.randn(64)

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        norm, residual, _, _ = torch.ops.splitpoint.allreduce_rmsnorm(
            x * 2, residual, weight, None, group=group, eps=1e-6
        )
        total = norm + 1
        torch.ops.splitpoint.allreduce_rmsnorm_(total, residual, weight, group=group, eps=1e-6)
        return total, residual

    graph = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (5, 9, 300):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
        residual = torch.randn(rows, 64, generator=torch.Generator().manual_seed(7))
        expected = layer(x, residual)
        for got, wanted in zip(graph(x, residual), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def unattached() -> None:
    ops.register()
    torch.manual_seed(dist.get_rank())
    for quant in reference.QUANTS:
        case = Case(3, (5, 64), torch.float32, quant=quant)
        given = make(case, dist.get_world_size())
        got = call(case, given)
        reduced = torch.stack(given.inputs).sum(0)
        expected = reference.finish(
            reduced, given.residual, given.weight, given.quant_scale, eps=case.eps, quant=quant
        )
        for each, wanted in zip(got, expected, strict=True):
            assert torch.equal(each.view(torch.uint8), wanted.view(torch.uint8))
        if quant == "none":
            for each, wanted in zip(call(replace(case, both=True), given), expected, strict=True):
                assert torch.equal(each.view(torch.uint8), wanted.view(torch.uint8))
    check_gathers()


def check_gathers() -> None:
    splitpoint = torch.ops.splitpoint
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.full((2 * ranks, 3), float(rank))
    total = sum(range(ranks))
    assert torch.equal(splitpoint.all_reduce(x, group=name()), torch.full_like(x, total))
    over = x.clone()
    splitpoint.all_reduce_(over, group=name())
    assert torch.equal(over, torch.full_like(x, total))
    assert torch.equal(splitpoint.reduce_scatter(x, group=name()), torch.full((2, 3), float(total)))
    assert splitpoint.all_gather(x, group=name()).shape == (2 * ranks * ranks, 3)
