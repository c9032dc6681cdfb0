"""Loads a core and the memory until it is killed: what `bench tuner` chooses kernels under.

    python -I disturb.py SEED

It reads, computes and rests in turns of random lengths, as other programs do; "ready" on standard
output says that it has begun.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import torch

READ_ELEMENTS = 16 << 20
"""Of float32 that it reads: more than most caches hold."""

SIDE = 256
"""Of the matrices that it multiplies."""

LONGEST_S = 0.2
"""Of a turn."""


def main(seed: int) -> None:
    """Take turns for ever."""
    torch.set_num_threads(1)
    numbers = random.Random(seed)
    data, matrix = torch.ones(READ_ELEMENTS), torch.ones(SIDE, SIDE)
    turns: list[Callable[[], object]] = [data.sum, lambda: matrix @ matrix]
    print("ready", flush=True)
    while True:
        for turn in turns:
            end = time.perf_counter() + numbers.uniform(0, LONGEST_S)
            while time.perf_counter() < end:
                turn()
        time.sleep(numbers.uniform(0, LONGEST_S / 4))


if __name__ == "__main__":
    main(int(sys.argv[1]))
