"""Names of guards, read step by step, say what they say when they are read at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpoint.torch_internals.guard_expressions import (
    GuardScope,
    NotPortable,
    _parsed,
    _parsed_whole,
)

STARTS = [
    *("L['self']", "self", "L['x']", "x", "L['other']", "other", "G['table']", "G['missing']"),
    *("L['cell']", "cell", "type(L['self'])", "list(dict.keys(L['self'].a))", "len", "L", "G"),
    *("L['self'].a + x", "{'a': self}", "'it.s'", "(self, x)", "1", "x if self else other", "("),
]
STEPS = [
    *(".a", "._modules", "['a']", "['it.s']", "['a-b']", "[0]", "[12]", ".a()", ".values()"),
    *('["a"]', "['it\\'s']", "['\u00e9']", ".\u00e9", "[-1]", "[x]", "[L['x']]", " .a", "[01]"),
    *(" + self", ".1", "[0:1]", "['a', 0]", "['L']", ".G"),
]


def scope():
    return GuardScope(
        None, "self", frozenset({"x"}), {"cell": (lambda: scope).__closure__}, {"table": {}}
    )


def outcome(parse, name):
    try:
        return parse(name, scope())
    except NotPortable:
        return NotPortable


@given(st.sampled_from(STARTS), st.lists(st.sampled_from(STEPS), max_size=5))
def test_a_name_is_read_step_by_step_as_at_once(start, steps):
    name = start + "".join(steps)
    assert outcome(_parsed, name) == outcome(_parsed_whole, name), name


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("L['self']._modules['model'].layers[3].weight", "self._modules['model'].layers[3].weight"),
        ("G['table']['a']", "G['table']['a']"),
        ("cell.a", "F['cell'].a"),
        ("L['x'].a['b']", None),
        ("L['other'].a", None),
    ],
)
def test_names_are_written_over_the_roots(name, code):
    assert _parsed(name, scope()) == code
