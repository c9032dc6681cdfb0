import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

import splitpoint
from splitpoint import Config, Range, errors
from splitpoint.collectives.launch import run_ranks
from splitpoint.passes.sequence_parallel import SequenceParallel

from .test_allreduce_rmsnorm import Operators

HIDDEN, EPS = 64, 1e-5


class Layers(torch.nn.Module):
    """Two layers whose residual goes on to the output, or not."""

    def __init__(self, group, keep, dtype, bias=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.a, self.b = (torch.randn(HIDDEN, HIDDEN, generator=generator) / 8 for _ in range(2))
        self.a, self.b = self.a.to(dtype), self.b.to(dtype)
        self.w = (torch.rand(HIDDEN, generator=torch.Generator().manual_seed(9)) + 0.5).to(dtype)
        self.group, self.keep, self.bias = group, keep, bias

    def norm(self, z):
        x = z.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return (x * (self.bias + self.w.float())).to(z.dtype)

    def forward(self, x):
        z = x
        for weight in (self.a, self.b):
            z = z + funcol.all_reduce(F.linear(x, weight), "sum", self.group)
            x = self.norm(z)
        return (x, z) if self.keep else x


def compare(cases):
    """In a rank: compile with the pass, and compare with eager; returns what was seen."""
    seen = []
    for keep, dtype, bias, shape, sizes, pad, config in cases:
        model = Layers(dist.group.WORLD, keep, dtype, bias).eval().requires_grad_(False)
        given, graph = SequenceParallel(min_size=1, pad=pad), Operators()
        compiled = splitpoint.compile(
            model, Config(passes=[given, graph], **config), dynamic_dims={"x": len(shape)}
        )
        worst = 0.0
        for size in sizes:
            x = torch.randn(*shape, size, HIDDEN, generator=torch.Generator().manual_seed(size))
            for a, b in zip(_list(compiled(x.to(dtype))), _list(model(x.to(dtype))), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                worst = max(worst, (a.float() - b.float()).abs().max().item())
        counts = [m.matches for m in compiled.stats().matches if m.name == "SequenceParallel"]
        gathers = sum("all_gather_into_tensor" in str(n.target) for n in graph.nodes)
        left = sum("all_reduce" in str(n.target) for n in graph.nodes)
        seen.append((counts, gathers, left, worst, compiled.plan.entry_for(8).collectives))
    return seen


def _list(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.processes
def test_two_ranks_compute_what_all_reduce_and_norm_compute():
    static = {"max_size": 8, "compile_sizes": [8], "split_points": [7], "lazy": True}
    cases = [
        # keep, dtype, bias, batch, sizes, pad, config
        (False, torch.float32, 0.0, (), [1, 2, 5, 16], True, {"max_size": 16}),
        (True, torch.float32, 1.0, (), [3, 8], False, static),
        (True, torch.bfloat16, 0.0, (1,), [8], False, static),
    ]
    first, second = run_ranks(2, 1, compare, cases)
    assert first == second
    padded, unpadded, batched = first
    # Two layers: of the residual nothing is gathered where only the norm goes out.
    assert padded[:3] == ([2], 2, 0)
    assert padded[4] == ("sequence parallel over 2 ranks, padded",)
    # [1,7] holds odd sizes and is left alone; 8 divides, and the residual goes out as well.
    assert unpadded[:3] == ([0, 2], 3, 2)
    assert unpadded[4] == ("sequence parallel over 2 ranks",)
    assert batched[:3] == ([2], 3, 0)
    assert padded[3] <= 5e-6
    assert unpadded[3] <= 5e-6
    assert batched[3] <= 2**-4, "one unit of the largest bf16 values"


def test_it_is_for_large_ranges():
    given = SequenceParallel(min_size=512)
    assert not given.applies_to(Range(1, 4096))
    assert given.applies_to(Range(512, 512))
    (again,) = Config.from_json(Config(passes=[given]).to_json()).passes
    assert again == given
    with pytest.raises(errors.InvalidField, match="1 or more"):
        SequenceParallel(min_size=0)
