import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpoint import Range, errors
from splitpoint.collectives.measured import Measurement, build, contradictions
from splitpoint.collectives.policy import (
    ALGORITHMS,
    FUSED,
    Entry,
    Interval,
    Key,
    Policy,
    chosen,
    largest_size,
    seed_policy,
)
from splitpoint.collectives.tables import read_table, table_json

TABLES = Path(__file__).parents[1] / "data" / "allreduce_rmsnorm_tables.json"
MIB = 2**20
KEY = Key("cpu", 2, "bfloat16", True, "none", 1024)


def rows_of(times, key=KEY):
    """Measurements from {bytes: {algorithm: seconds}}."""
    return [
        Measurement(key, nbytes, tuple((a, t[a]) for a in ALGORITHMS if a in t))
        for nbytes, t in times.items()
    ]


# --- public tables ---------------------------------------------------------------------


def test_public_tables_give_back_the_fastest_operation_of_every_configuration():
    rows, source = read_table(TABLES)
    policy = build(rows, source)
    assert len(rows) == 68
    wrong = [row for row in rows if policy.choose(row.key, row.nbytes)[0] not in row.fastest()]
    assert wrong == []
    # Not by keeping every point apart.
    assert sum(len(entry.intervals) for entry in policy.entries) < len(rows) / 2


def test_one_threshold_for_all_hidden_sizes_contradicts_the_tables_on_4_ranks_of_b200():
    rows, source = read_table(TABLES)
    found = {c.nbytes: c for c in contradictions(rows)}
    assert set(found) == {2 * MIB, 4 * MIB}
    assert {(c.key.device, c.key.world_size, c.key.quant) for c in found.values()} == {
        ("sm100", 4, "none")
    }
    assert found[2 * MIB].fastest == ((1024, ("one_shot",)), (8192, ("standard",)))
    assert found[2 * MIB].best_common == "one_shot"
    assert found[2 * MIB].slowdown == pytest.approx(0.032 / 0.031)
    assert found[4 * MIB].slowdown == pytest.approx(0.06 / 0.049)
    assert "up to 22 % slower than by hidden size" in str(found[4 * MIB])
    keyed = {
        (entry.key.device, entry.key.world_size)
        for entry in build(rows, source).entries
        if entry.key.quant == "none" and entry.key.device == "sm100" and entry.key.hidden
    }
    assert keyed == {("sm100", 4)}, "2 and 8 ranks need no hidden size"


def test_a_table_written_is_the_table_read(tmp_path):
    rows, source = read_table(TABLES)
    path = tmp_path / "table.json"
    path.write_text(table_json(rows, source))
    again, said = read_table(path)
    assert said == source
    assert [(r.key, r.nbytes) for r in again] == [(r.key, r.nbytes) for r in rows]
    assert all(
        dict(a.seconds) == pytest.approx(dict(b.seconds)) for a, b in zip(again, rows, strict=True)
    )


@pytest.mark.parametrize("text", ["", "[]", '{"source": "x"}', '{"source": "x", "rows": [{}]}'])
def test_what_is_not_a_table_is_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(errors.InvalidPolicy, match="not a table"):
        read_table(path)


# --- seeds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "ranks", "fused_mib", "one_shot_mib"),
    [
        *(("sm90", 2, 64, 32), ("sm90", 4, 2, 2), ("sm90", 8, 0.5, 0.5)),
        *(("sm100", 2, 64, 32), ("sm100", 4, 32, 4), ("sm100", 8, 1, 1)),
    ],
)
def test_seeds_for_nvidia(device, ranks, fused_mib, one_shot_mib):
    key = Key(device, ranks, "bfloat16", True, "fp8_static", 4096)
    choose = lambda mib, more=0: seed_policy().choose(key, int(mib * MIB) + more)[0]
    assert choose(one_shot_mib) == "one_shot"
    assert choose(fused_mib) in FUSED
    assert choose(fused_mib, 1) == "standard"
    if fused_mib > one_shot_mib:
        assert choose(one_shot_mib, 1) == choose(fused_mib) == "two_shot"
    assert seed_policy().split_points(key, 2, 2**20) == (int(fused_mib * MIB) // 8192,)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_on_cpu_the_seed_is_fused_at_every_size(ranks):
    for quant in ("none", "fp8_static", "fp8_token", "nvfp4"):
        key = Key("cpu", ranks, "bfloat16", True, quant, 576)
        entry = seed_policy().entry(key)
        assert {interval.algorithm for interval in entry.intervals} == FUSED
        assert seed_policy().split_points(key, 2, 8192) == ()
    assert seed_policy().entry(replace(key, quant="none")) != entry, "the quantised cut is lower"


def test_every_seed_names_its_source():
    assert all(len(entry.source) > 20 for entry in seed_policy().entries)


def test_an_unknown_device_is_served_by_standard():
    assert seed_policy().choose(replace(KEY, device="sm75"), 1) == (
        "standard",
        "nothing is known of sm75, 2 ranks, bfloat16, residual, hidden 1024",
    )


# --- choosing --------------------------------------------------------------------------


def test_measured_comes_before_seed_and_admission_before_both():
    measured = Policy((Entry(KEY, (Interval(None, "two_shot"),), "measured", "here"),))
    policy = measured.over(seed_policy())
    assert seed_policy().choose(KEY, 64)[0] == "one_shot"
    assert policy.choose(KEY, 64)[0] == "two_shot"
    assert policy.choose(KEY, 64, {"standard", "one_shot"})[0] == "one_shot"
    algorithm, why = policy.choose(KEY, 64, {"standard"})
    assert algorithm == "standard"
    assert "two_shot is not admitted" in why
    # Another dtype was not measured: the seed speaks.
    assert policy.choose(replace(KEY, dtype="float32"), 64)[0] == "one_shot"


def test_any_hidden_size_is_served_by_what_is_for_all_of_them():
    one, all_ = (
        Entry(replace(KEY, hidden=hidden), (Interval(None, algorithm),), "seed", "")
        for hidden, algorithm in ((4096, "two_shot"), (None, "one_shot"))
    )
    anything = replace(KEY, hidden=None)
    assert Policy((one, all_)).choose(anything, 1)[0] == "one_shot"
    assert Policy((one, all_)).choose(replace(KEY, hidden=4096), 1)[0] == "two_shot"
    assert Policy((one, all_)).choose(replace(KEY, hidden=2048), 1)[0] == "one_shot"
    assert Policy((one,)).choose(anything, 1)[0] == "two_shot"


def test_the_nearest_hidden_size_and_the_right_residual_decide():
    entries = [
        Entry(replace(KEY, hidden=h, residual=r), (Interval(None, a),), "measured", "")
        for h, r, a in (
            (512, True, "one_shot"),
            (8192, True, "standard"),
            (1024, False, "two_shot"),
        )
    ]
    policy = Policy(tuple(entries))
    assert policy.choose(replace(KEY, hidden=1000), 1)[0] == "one_shot"
    assert policy.choose(replace(KEY, hidden=5000), 1)[0] == "standard"
    assert policy.choose(replace(KEY, hidden=8192, residual=False), 1)[0] == "two_shot"


def test_a_range_over_two_graphs_takes_that_of_its_largest_size_and_says_where_to_split():
    key = Key("sm90", 4, "bfloat16", True, "none", 8192)
    decide = lambda start, end: seed_policy().decide(key, 2, Range(start, end))
    assert decide(1, 128).algorithms == ("one_shot",)
    assert decide(129, 4096).algorithms == ("standard",)
    both = decide(1, 4096)
    assert both.algorithms == ("one_shot", "standard")
    assert not both.fused
    assert "split point at 128" in both.why
    cpu = seed_policy().decide(KEY, 2, Range(1, 8192))
    assert (cpu.fused, cpu.algorithm) == (True, "one_shot:3145728,two_shot")
    assert "split point" not in cpu.why


@given(
    ends=st.lists(st.integers(0, 10**7), unique=True, max_size=5).map(sorted),
    names=st.lists(st.sampled_from(ALGORITHMS), min_size=6, max_size=6),
    hidden=st.integers(1, 9000),
    itemsize=st.sampled_from([2, 4]),
    start=st.integers(1, 3000),
    length=st.integers(0, 3000),
)
def test_ranges_and_split_points_agree_with_the_bytes_of_each_size(
    ends, names, hidden, itemsize, start, length
):
    intervals = (
        *(Interval(end, name) for end, name in zip(ends, names, strict=False)),
        Interval(None, names[-1]),
    )
    key = replace(KEY, hidden=hidden)
    policy = Policy((Entry(key, intervals, "measured", ""),))
    assert Policy.from_json(policy.to_json()) == policy
    row = hidden * itemsize
    range_ = Range(start, start + length)
    sizes = range(start, start + length + 1)
    served = [policy.choose(key, size * row)[0] for size in sizes]
    decision = policy.decide(key, itemsize, range_)
    runs = [a for i, a in enumerate(served) if i == 0 or served[i - 1] != a]
    # An interval that lies between two sizes serves none of them.
    assert decision.algorithms == tuple(runs)
    if set(runs) <= FUSED:
        assert [chosen(decision.algorithm, size * row) for size in sizes] == served
    points = set(policy.split_points(key, itemsize, range_.end))
    for size, (a, b) in zip(sizes, pairwise(served), strict=False):
        assert size in points or (a in FUSED) == (b in FUSED)
    assert all(largest_size(p * row + row - 1, hidden, itemsize) == p for p in points)


# --- building --------------------------------------------------------------------------

TIMES = st.dictionaries(
    st.sampled_from([2**n for n in range(10, 24)]),
    st.fixed_dictionaries({a: st.floats(1e-6, 1e-2) for a in ALGORITHMS}),
    min_size=1,
    max_size=8,
)


@given(TIMES, TIMES)
def test_what_is_built_gives_each_measurement_its_fastest(first, second):
    rows = rows_of(first) + rows_of(second, replace(KEY, hidden=4096))
    policy = build(rows, "here")
    for row in rows:
        assert policy.choose(row.key, row.nbytes)[0] in row.fastest()


def test_an_algorithm_may_win_in_a_band():
    slow, fast = 2e-5, 1e-5
    times = {
        2**10: {"one_shot": fast, "two_shot": slow},
        2**14: {"one_shot": slow, "two_shot": fast},
        2**18: {"one_shot": fast, "two_shot": slow},
    }
    (entry,) = build(rows_of(times), "here").entries
    assert [i.algorithm for i in entry.intervals] == ["one_shot", "two_shot", "one_shot"]
    assert [i.end for i in entry.intervals] == [2**12, 2**16, None], "in the middle, in logarithms"


def test_a_tie_spends_no_interval():
    times = {
        2**10: {"one_shot": 1.00e-5, "two_shot": 2e-5},
        2**12: {"one_shot": 1.02e-5, "two_shot": 1e-5},
        2**14: {"one_shot": 1.00e-5, "two_shot": 2e-5},
    }
    (entry,) = build(rows_of(times), "here").entries
    assert entry.intervals == (Interval(None, "one_shot"),)


def test_one_configuration_measured_twice_is_refused():
    rows = rows_of({2**10: {"one_shot": 1e-5}})
    with pytest.raises(errors.InvalidPolicy, match="twice"):
        build(rows * 2, "here")


# --- JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no", "not the JSON of a policy"),
        ("{}", "not the JSON of a policy"),
        ([[None, "magic"]], "algorithm must be one of"),
        ([[5, "one_shot"]], "must have end null"),
        ([[5, "one_shot"], [3, "standard"], [None, "standard"]], "must ascend"),
        ([], "must have end null"),
    ],
)
def test_a_bad_policy_is_refused(text, said):
    if not isinstance(text, str):
        entry = {"key": {"device": "cpu", "world_size": 2}, "origin": "seed", "source": ""}
        text = json.dumps({"entries": [entry | {"intervals": text}]})
    with pytest.raises(errors.InvalidPolicy, match=said):
        Policy.from_json(text)


def test_seeds_survive_json_and_print_as_a_table():
    assert Policy.from_json(seed_policy().to_json()) == seed_policy()
    lines = str(seed_policy()).splitlines()
    assert lines[0].split() == ["configuration", "up", "to", "algorithm", "origin"]
    assert any("sm100, 4 ranks" in line and "4 MiB  one_shot" in line for line in lines)
