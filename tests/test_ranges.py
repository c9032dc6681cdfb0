import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpoint import Config, Plan, PlannedRange, Range
from splitpoint.config import NOT_AUTOTUNED
from splitpoint.errors import InvalidJSON, InvalidRange, SizeOutOfPlan


def points(max_size):
    return st.lists(st.integers(1, max_size), unique=True, max_size=6).map(sorted)


@st.composite
def configs(draw):
    max_size = draw(st.integers(1, 200))
    return Config(
        max_size=max_size,
        split_points=draw(points(max_size)),
        compile_sizes=draw(points(max_size)),
        hint=draw(st.sampled_from(["start", "middle", "end"])),
    )


def test_range_is_inclusive_at_both_ends():
    range_ = Range(9, 32)
    assert [size for size in range(50) if size in range_] == list(range(9, 33))
    assert len(range_) == 24
    assert str(range_) == "[9,32]"
    assert not range_.is_single_size
    assert Range(16, 16).is_single_size
    assert "9" not in range_


@pytest.mark.parametrize(("start", "end"), [(0, 4), (-1, 4), (5, 4), (1.0, 4), (True, 4)])
def test_range_refuses(start, end):
    with pytest.raises(InvalidRange):
        Range(start, end)


def test_ranges_order_by_end_so_that_single_sizes_come_first():
    ranges = [Range(33, 64), Range(9, 32), Range(16, 16), Range(1, 8)]
    assert sorted(ranges) == [Range(1, 8), Range(16, 16), Range(9, 32), Range(33, 64)]


@pytest.mark.parametrize("text", ["9-32", "[9,32]", " 9-32 ", "[9-32]"])
def test_range_parses_what_it_prints(text):
    assert Range.parse(text) == Range(9, 32)


@pytest.mark.parametrize("text", ["", "a-b", "1-2-3", "9-", "32-9", "0-4"])
def test_range_parse_refuses(text):
    with pytest.raises(InvalidRange):
        Range.parse(text)


def test_plan_of_the_example_in_the_docs():
    plan = Config(max_size=8192, split_points=[8, 32], compile_sizes=[16, 64, 128]).plan()
    assert [str(r) for r in plan.ranges] == [
        *("[1,8]", "[16,16]", "[9,32]", "[64,64]", "[128,128]", "[33,8192]"),
    ]


@given(configs())
def test_every_size_has_the_narrowest_range_around_it(config):
    plan = config.plan()
    for size in range(1, config.max_size + 1):
        found = plan.range_for(size)
        around = [r for r in plan.ranges if size in r]
        assert found == min(around, key=len)
        assert found.is_single_size or size not in config.compile_sizes


@given(configs())
def test_ranges_without_single_sizes_tile_the_plan(config):
    single = [Range(size, size) for size in config.compile_sizes]
    wide = [r for r in config.plan().ranges if r not in single]
    covered = {size for r in wide for size in range(r.start, r.end + 1)}
    assert covered | set(config.compile_sizes) == set(range(1, config.max_size + 1))
    for a, b in itertools.pairwise(wide):
        assert a.end < b.start


@given(configs())
def test_hints_lie_in_their_ranges(config):
    assert all(entry.hint in entry.range for entry in config.plan().entries)


@given(configs())
def test_plan_json_round_trip(config):
    plan = config.plan()
    assert Plan.from_json(plan.to_json()) == plan


def test_plan_json_keeps_what_a_compile_found():
    entry = PlannedRange(
        Range(1, 9),
        9,
        ("P",),
        {"a": 1},
        {"4->8": "packed"},
        ((1, 3), (5, 9)),
        "split",
        ("one_shot",),
    )
    plan = Plan(9, (entry,), ("refused: 4",))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.range_for(3) == Range(1, 9)
    with pytest.raises(SizeOutOfPlan):
        plan.range_for(4)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"max_size": 1, "ranges": [{}], "notes": []}'])
def test_plan_from_json_refuses(text):
    with pytest.raises(InvalidJSON):
        Plan.from_json(text)


@pytest.mark.parametrize("size", [0, -1, 65, 2**20])
def test_size_outside_the_plan(size):
    with pytest.raises(SizeOutOfPlan, match=r"\[1,64\]"):
        Config(max_size=64).plan().range_for(size)


def test_lookup_at_the_largest_plan_does_not_depend_on_the_number_of_ranges():
    config = Config(max_size=2**20, split_points=list(range(1000, 2**20, 1000)))
    plan = config.plan()
    assert len(plan.ranges) == 1049
    assert len(plan.table) == 2**20 + 1
    assert plan.range_for(2**20) == Range(1048001, 2**20)
    assert plan.range_for(123_456) == Range(123_001, 124_000)


def test_a_range_made_of_single_sizes_only_is_left_out_and_said():
    plan = Config(max_size=8, split_points=[2], compile_sizes=[1, 2]).plan()
    assert [str(r) for r in plan.ranges] == ["[1,1]", "[2,2]", "[3,8]"]
    assert "[1,2]" in plan.notes[0]
    assert "[1,2]" in str(plan)


@pytest.mark.parametrize(
    "options",
    [
        {"compile_sizes": [1], "inductor_options": {"max_autotune": True}},
        {"compile_sizes": [1], "inductor_options": {"1": {"max_autotune": True}}},
        {"compile_sizes": [1], "backend": "eager"},
        {},
    ],
)
def test_a_plan_says_that_single_sizes_are_not_tuned_only_where_that_is_so(options):
    assert NOT_AUTOTUNED not in Config(max_size=8, **options).plan().notes
    only_other = Config(
        max_size=8, compile_sizes=[1, 2], inductor_options={"1": {"max_autotune": True}}
    )
    assert NOT_AUTOTUNED in only_other.plan().notes


def test_plan_prints_as_an_aligned_table():
    plan = Config(max_size=2048, split_points=[8], compile_sizes=[1]).plan()
    heading, *rows, note = str(plan).splitlines()
    assert note == NOT_AUTOTUNED
    assert heading.split() == ["range", "sizes", "hint", "passes"]
    assert [row.split()[:3] for row in rows] == [
        ["[1,1]", "1", "static"],
        ["[1,8]", "7", "8"],
        ["[9,2048]", "2040", "2048"],
    ]
    column = heading.index("passes")
    assert all(row[column - 1] == " " and row[column] != " " for row in rows)
