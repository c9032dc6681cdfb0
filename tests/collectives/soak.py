"""Many random calls in a row: python -m tests.collectives.soak --ranks 2 --calls 100000.

Each case is compared with float64 once; every later call of it must give the same bits.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
import torch.distributed as dist

from splitpoint.collectives import reference
from tests.collectives import cases
from tests.collectives.ranks import Ranks, attach_with
from tests.collectives.test_shm import random_case

CASES = 150


def soak(calls: int, seed: int) -> str:
    """Random calls of random cases, each rank pausing when it likes; which ones, all ranks know."""
    alike, own = random.Random(seed), random.Random(seed + 1 + dist.get_rank())
    known = []
    for _ in range(CASES):
        case = random_case(alike)
        if not case.want_norm:
            continue
        given = cases.make(case, dist.get_world_size())
        got = cases.call(case, given)
        cases.check(case, given, got)
        known.append((case, given, got))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    wrong = 0
    for _ in range(calls):
        case, given, expected = known[alike.randrange(len(known))]
        if own.random() < 0.01:
            time.sleep(own.random() * 1e-3)
        got = cases.call(case, given)
        wrong += not _equal(got, expected)
    return f"{calls} calls of {len(known)} cases, {wrong} wrong"


def _equal(got: reference.Fused, expected: reference.Fused) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(got, expected, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with Ranks(args.ranks) as ranks:
        ranks.run(attach_with, {})
        ranks.start(soak, args.calls, args.seed)
        for rank in range(args.ranks):
            print(f"rank {rank}: {ranks.result(rank, 3600)}", flush=True)


if __name__ == "__main__":
    main()
