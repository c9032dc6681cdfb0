"""What the machine is measured by."""

from __future__ import annotations

import pytest
import torch

from splitpoint import kernels

pytestmark = pytest.mark.usefixtures("poisoned")  # puts instruction set and threads back

TILES = 4 * 2 * 16 * 16 * 32
"""Operations of a step: four products of tiles, a multiply-add as two."""


@pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
def test_operations_in_registers_are_counted(instruction_set: str) -> None:
    kernels.use_instruction_set(instruction_set)
    multiply = torch.ops.splitpoint.multiply_registers
    fp32, bf16 = multiply(False, 1), multiply(True, 1)
    assert fp32 > 0
    # Pairs of bf16 where there are instructions for them; elsewhere it is multiplied as fp32.
    assert bf16 == {"amx": TILES, "avx512_bf16": 2 * fp32}.get(instruction_set, fp32)
    assert multiply(False, 7) == 7 * fp32
    torch.set_num_threads(2)
    assert multiply(True, 7) == 14 * bf16
