"""The shared-memory collectives against float64, and each other, over real processes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitpoint.collectives import shm
from splitpoint.collectives.reference import DTYPES, QUANTS
from tests.collectives import cases, native, plain
from tests.collectives.cases import Case
from tests.collectives.ranks import Ranks

pytestmark = pytest.mark.processes

Attached = Callable[[int], Ranks]

SIZES = (1, 2, 3, 7, 16, 64, 200, 512)
HIDDENS = (64, 80, 576, 1008, 2048, 8192)
ODD_HIDDENS = (1, 7, 65, 577, 1000, 4097)
MOST_ELEMENTS = 1 << 16
"""Of one case's input, so that float64 references of all ranks stay cheap."""


def random_case(rng: random.Random) -> Case:
    dtype = rng.choice(DTYPES)
    quant = rng.choice(QUANTS)
    hidden = rng.choice(HIDDENS if quant == "nvfp4" or rng.random() < 0.6 else ODD_HIDDENS)
    rows = min(rng.choice(SIZES), max(1, MOST_ELEMENTS // hidden))
    form = rng.choice(("any", "any", "in place", "both")) if quant == "none" else "any"
    in_place, both = form == "in place", form == "both"
    return Case(
        seed=rng.randrange(1 << 30),
        shape=(2, rows, hidden) if rng.random() < 0.1 and not in_place else (rows, hidden),
        dtype=dtype,
        residual=rng.choice(("none", "same", "wide")),
        weight_dtype=rng.choice((dtype, torch.float32)),
        quant=quant,
        algorithm=rng.choice(("auto", "one_shot", "two_shot", "one_shot:4096,two_shot")),
        eps=rng.choice((1e-6, 1e-5)),
        weight_bias=rng.choice((0.0, 0.0, 1.0)),
        want_norm=in_place or both or quant == "none" or rng.random() < 0.6,
        want_residual=in_place or both or rng.random() < 0.7,
        in_place=in_place,
        both=both,
    )


def check(ranks: Ranks, given_cases: list[Case], instruction_set: str = "best") -> None:
    digests = ranks.run(cases.run, given_cases, instruction_set)
    assert all(each == digests[0] for each in digests), "the ranks' results differ"


@settings(max_examples=7, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.sampled_from([2, 2, 3, 4, 8]))
def test_random_calls(attached: Attached, seed: int, count: int) -> None:
    rng = random.Random(seed)
    check(attached(count), [random_case(rng) for _ in range(40 // count)])


@pytest.mark.parametrize("instruction_set", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set(attached: Attached, instruction_set: str) -> None:
    if instruction_set not in shm.instruction_sets():
        pytest.skip(f"this CPU has no {instruction_set}")
    some = [
        Case(seed, (3, hidden), dtype, residual, quant=quant, algorithm=algorithm)
        for seed, (dtype, residual, quant, hidden, algorithm) in enumerate(
            (dtype, residual, quant, hidden, algorithm)
            for dtype in DTYPES
            for residual in ("none", "same", "wide")
            for quant in QUANTS
            for hidden in (64, 1008, *(() if quant == "nvfp4" else (77,)))
            for algorithm in ("one_shot", "two_shot")
        )
    ]
    check(attached(2), some, instruction_set)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("count", [2, 3])
def test_inputs_of_many_chunks(attached: Attached, count: int, algorithm: str) -> None:
    many = [
        Case(1, (4096, 576), algorithm=algorithm),
        Case(2, (4096, 64), torch.float32, "wide", algorithm=algorithm),
        Case(3, (700, 1000), torch.float16, "wide", algorithm=algorithm, in_place=True),
        Case(4, (513, 2048), quant="fp8_token", algorithm=algorithm),
        Case(5, (333, 4096), quant="nvfp4", algorithm=algorithm),
    ]
    check(attached(count), many)


@pytest.mark.parametrize("past_caches", [False, True])
def test_either_way_of_storing(attached: Attached, past_caches: bool) -> None:
    ranks = attached(2)
    ranks.run(plain.copy_past_caches, past_caches)
    some = [
        Case(seed, shape, algorithm=algorithm)
        for seed, shape in enumerate([(1, 1), (3, 77), (5, 1000), (400, 576)])
        for algorithm in ("one_shot", "two_shot")
    ]
    try:
        check(ranks, some)
    finally:
        ranks.run(plain.copy_past_caches, False)


def test_several_threads_a_rank(attached: Attached) -> None:
    ranks = attached(2)
    some = [
        Case(seed, (rows, 1000), quant=quant, algorithm=algorithm)
        for seed, rows in enumerate([1, 2, 3, 100, 1001])
        for quant in ("none", "fp8_token")
        for algorithm in ("one_shot", "two_shot")
    ]
    one = ranks.run(cases.run, some)
    ranks.run(plain.set_threads, 3)
    try:
        assert ranks.run(cases.run, some) == one
        ranks.run(plain.check, 7, 200_000)
    finally:
        ranks.run(plain.set_threads, 1)


def test_algorithms_and_forms_agree_to_the_bit(attached: Attached) -> None:
    variants = [
        Case(9, (37, 576), residual="same", algorithm=algorithm, **{form: True})
        for algorithm in ("one_shot", "two_shot")
        for form in ("want_norm", "in_place", "both")
    ]
    (digests,) = {tuple(each) for each in attached(3).run(cases.run, variants)}
    assert len(set(digests)) == 1


def test_empty_inputs_and_nan(attached: Attached) -> None:
    ranks = attached(2)
    assert ranks.run(plain.empty) == [[(0, 64), (0, 64), (0,), (0,)]] * 2
    assert ranks.run(plain.nan) == [True, True]


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_plain_collectives(attached: Attached, count: int) -> None:
    attached(count).run(plain.check, 1, 5)
    attached(count).run(plain.check, 2, 3001)
    attached(count).run(plain.check, 3, 100_001 // count**2)


@pytest.mark.parametrize("count", [2, 3])
def test_data_movement_touches_all_there_is_to_move(attached: Attached, count: int) -> None:
    for rows, hidden in ((1, 7), (5, 1000), (300, 577)):
        for dtype in (torch.bfloat16, torch.float32):
            attached(count).run(plain.moved, rows, hidden, dtype)


def test_another_thread_runs_while_one_waits(attached: Attached) -> None:
    assert min(attached(2).run(plain.counted_while_waiting)) > 1000


def test_opcheck_and_compile(attached: Attached) -> None:
    attached(2).run(plain.opcheck)
    attached(2).run(plain.compiled)


def test_the_runner_is_python_to_the_bit(attached: Attached) -> None:
    attached(2).run(native.forms)
    attached(2).run(native.compare, random.Random().sample(range(1 << 30), 60))


def test_a_group_without_a_workspace_is_served_by_the_reference() -> None:
    with Ranks(2) as ranks:
        ranks.run(plain.unattached)
