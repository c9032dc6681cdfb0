"""Timing, on a clock that the tests move themselves."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpoint.tuning.measure import (
    MAX_CALLS,
    MIN_REPEATS,
    THREAD_CPU_TIME,
    WALL_TIME,
    Clock,
    clock_for,
    interleave,
)


class FakeTime:
    """A clock, and callables that take a given time on it and leave a record."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.clock = Clock("fake", lambda: self.now)

    def takes(self, name: str, *seconds: float):
        """A callable that takes the given times in turn, the last one from then on."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


seconds = st.floats(min_value=1e-5, max_value=3.0)


@given(st.lists(seconds, min_size=1, max_size=4), st.floats(0.01, 2.0))
def test_a_steady_callable_is_timed_exactly(times: list[float], budget: float):
    fake = FakeTime()
    callables = {str(i): fake.takes(str(i), s) for i, s in enumerate(times)}
    timings = interleave(callables, clock=fake.clock, budget_s=budget)
    for timing, expected in zip(timings.values(), times, strict=True):
        assert timing.median_s == pytest.approx(expected, rel=1e-6)
        assert timing.best_s == pytest.approx(expected, rel=1e-6)
        assert timing.spread == pytest.approx(0, abs=1e-6)


@given(st.lists(seconds, min_size=1, max_size=4), st.floats(0.01, 2.0))
def test_the_budget_bounds_the_timed_calls(times: list[float], budget: float):
    fake = FakeTime()
    callables = {str(i): fake.takes(str(i), s) for i, s in enumerate(times)}
    timings = interleave(callables, clock=fake.clock, budget_s=budget)
    for timing, s in zip(timings.values(), times, strict=True):
        spent = timing.repeats * timing.calls * s
        assert spent <= max(budget, MIN_REPEATS * s) * (1 + 1e-6)
        assert timing.repeats >= MIN_REPEATS


def test_warm_up_is_not_timed():
    fake = FakeTime()
    timing = interleave({"a": fake.takes("a", 100.0, 100.0, 0.1)}, clock=fake.clock)["a"]
    assert timing.median_s == pytest.approx(0.1)
    assert timing.repeats == 9


def test_turns_are_taken_and_the_first_turn_goes_round():
    fake = FakeTime()
    interleave(
        {name: fake.takes(name, 1.0) for name in "abc"},
        clock=fake.clock,
        budget_s=1e-3,
        repeats=3,
        warm_up=0,
    )
    # One call each to estimate, then three rounds of one call each.
    assert "".join(fake.calls) == "abc" + "abc" + "bca" + "cab"


def test_what_comes_before_a_part_is_called_each_time_and_not_timed():
    fake = FakeTime()
    timings = interleave(
        {name: fake.takes(name, 1.0) for name in "ab"},
        clock=fake.clock,
        budget_s=1e-3,
        repeats=3,
        warm_up=0,
        before=fake.takes("-", 100.0),
    )
    assert "".join(fake.calls) == "ab" + "-a-b" + "-b-a" + "-a-b"
    assert {timing.median_s for timing in timings.values()} == {1.0}


def test_a_slow_one_does_not_cost_the_others_their_rounds():
    fake = FakeTime()
    callables = {"fast": fake.takes("f", 0.1), "slow": fake.takes("s", 5.0)}
    timings = interleave(callables, clock=fake.clock, budget_s=0.9, warm_up=0)
    assert (timings["fast"].repeats, timings["slow"].repeats) == (9, MIN_REPEATS)
    # One call each to estimate, then nine rounds: the slow one is in the 2nd, 5th and 8th.
    assert "".join(fake.calls) == "fs" + "f" + "sf" + "ff" + "fs" + "ff" + "sf" + "f"


def test_drift_meets_all_alike():
    """A machine that slows down steadily must not make either of two equals the winner."""
    fake = FakeTime()
    pace = [1.0]

    def drifting() -> None:
        pace[0] *= 1.01
        fake.now += pace[0]

    timings = interleave({"a": drifting, "b": drifting}, clock=fake.clock, budget_s=20.0, repeats=8)
    assert timings["a"].median_s == pytest.approx(timings["b"].median_s, rel=0.03)


def test_median_best_and_spread():
    fake = FakeTime()
    # 2 to warm up, 1 to estimate, then 5 rounds.
    call = fake.takes("a", 9.0, 9.0, 1.0, 3.0, 1.0, 2.0, 5.0, 4.0)
    timing = interleave({"a": call}, clock=fake.clock, budget_s=5.0, repeats=5)["a"]
    assert (timing.median_s, timing.best_s, timing.repeats, timing.calls) == (3.0, 1.0, 5, 1)
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)


def test_a_clock_that_stands_still_ends():
    timing = interleave({"a": lambda: None}, clock=Clock("stuck", lambda: 0.0), repeats=3)["a"]
    assert timing.median_s == 0
    assert timing.calls == MAX_CALLS


def test_no_garbage_is_collected_while_timing():
    seen = []
    fake = FakeTime()
    step = fake.takes("a", 1.0)
    interleave(
        {"a": lambda: (seen.append(gc.isenabled()), step())},
        clock=fake.clock,
        budget_s=3.0,
        warm_up=0,
    )
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_error():
    def fails() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        interleave({"a": fails}, clock=WALL_TIME, warm_up=0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "arguments",
    [{"budget_s": 0}, {"repeats": MIN_REPEATS - 1}, {"warm_up": -1}],
)
def test_arguments_out_of_range(arguments: dict):
    with pytest.raises(ValueError, match="need at least one callable"):
        interleave({"a": lambda: None}, clock=WALL_TIME, **arguments)
    with pytest.raises(ValueError, match="need at least one callable"):
        interleave({}, clock=WALL_TIME)


def test_the_clock_for_one_thread_does_not_count_others():
    assert clock_for(1) is THREAD_CPU_TIME
    assert clock_for(2) is WALL_TIME
    start = THREAD_CPU_TIME.read()
    before = time.process_time()
    busy = threading.Thread(target=lambda: sum(range(3_000_000)))
    busy.start()
    busy.join()
    # What the thread cost is in the process's time and not in this thread's.
    assert THREAD_CPU_TIME.read() - start < (time.process_time() - before) / 2
