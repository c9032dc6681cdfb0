"""Programs that say nonsense are refused when they are made, or fail as errors when they run."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitpoint.kernels import watch_type
from splitpoint.runtime.native_library import program_type

Json = Any


@pytest.fixture(scope="module")
def make() -> Callable[..., Any]:
    if (found := program_type()) is None:
        pytest.skip("the runner needs a C++ compiler and Python's headers")
    return found


def full(expression: str) -> Json:
    return ["op", "aten::full.default", [0], [[], {"e": expression}], {"dtype": torch.int64}]


NO_EXPRESSIONS = (
    *("", " ", "s ", " s", "s  s +", "s s", "s +", "+", "+ s", "1 2", "s 2 ! *", "12a", "x", "- 1"),
    *("9" * 30, "1.5", "0x10", "\0", "s s ++", " ".join(["1"] * 200 + ["+"] * 199)),
)


@pytest.mark.parametrize("text", NO_EXPRESSIONS)
def test_what_is_no_expression_is_refused(make: Callable[..., Any], text: str) -> None:
    with pytest.raises(ValueError, match="expression"):
        make([], [full(text)], 0, 0, [0])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("s s *", 2**32),
        ("s 1 +", 2**63 - 1),
        ("0 s - 2 -", 2**63 - 1),
        ("0 s - 1 - -1 /", 2**63 - 1),
        ("s 0 /", 1),
        ("1 s %", 0),
    ],
)
def test_an_integer_that_is_none_is_an_error(
    make: Callable[..., Any], text: str, size: int
) -> None:
    program = make([], [full(text)], 0, 0, [0])
    program.bind([])
    with pytest.raises(RuntimeError, match=r"64 bits|by zero"):
        program(size)


def test_the_smallest_integer_is_one(make: Callable[..., Any]) -> None:
    program = make([], [full("0 s - 1 - -1 %")], 0, 0, [0])
    program.bind([])
    assert program(2**63 - 1)[0].item() == 0


PIECE: Json = {
    "parameters": [0, 1],
    "steps": [
        ["empty", 2, torch.float32, ["s", "4"], ["4", "1"]],
        ["op", "aten::copy_.default", [-1], [{"t": 2}, {"t": 0}], {}],
        ["sizes", 0, ["s", "4"], ["4", "1"], "what"],
        ["dtype", 0, torch.float32, "what"],
        ["align", 0, "4", None],
        ["op", "aten::sort.default", [3, -1], [{"t": 2}, -1, False], {}],
        ["op", "aten::cat.default", [4], [[{"t": 3}, {"t": 1}], 1], {}],
        ["free", [3]],
        ["bump", [1]],
    ],
    "outputs": [2, 4],
    "kernels": [],
}
PROGRAM: list[Json] = [
    [PIECE],
    [
        ["op", "aten::add.Tensor", [0], [{"t": -1}, {"t": -2}], {"alpha": 2}],
        ["piece", 0, [0, -2], [1, 2], [0]],
        ["op", "aten::mul.Tensor", [3], [{"t": 1}, {"t": 1}], {}],
        ["free", [1]],
    ],
    1,
    1,
    [2, 3],
]
HELD = torch.arange(12.0).view(3, 4)


def run(make: Callable[..., Any], program: list[Json]) -> list[torch.Tensor]:
    made = make(*program)
    made.bind([HELD.clone()] * program[3])
    return list(made(3, *[HELD.clone()] * program[2]))


def test_the_program_below_is_right(make: Callable[..., Any]) -> None:
    joined, squared = run(make, PROGRAM)
    assert torch.equal(squared, (3 * HELD) ** 2)
    assert torch.equal(joined, torch.cat([3 * HELD, HELD], 1))


def places(value: Json, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all parts of nested lists and dicts."""
    yield way
    if isinstance(value, (list, dict)):
        for key, each in enumerate(value) if isinstance(value, list) else value.items():
            yield from places(each, (*way, key))


WRONG = (
    *(-1, -2, -3, -9, 0, 1, 2, 5, 99, 2**31, 2**63, -(2**31), -(2**63), 0.5, True, None, "", "s"),
    *("7", "-7", "nothing", "aten::mm.default", "empty", "view", "free", [], [[]], [0], [-4], {}),
    *({"t": 7}, {"t": -7}, {"e": "s s"}, {"x": 0}, torch.int8, torch.ones(2), object()),
)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=300)
def test_a_program_with_something_wrong_is_refused_or_runs(seed: int) -> None:
    """Whatever it is: nothing outside its own tensors is touched, which the sanitizers see."""
    if (make := program_type()) is None:
        pytest.skip("the runner needs a C++ compiler and Python's headers")
    chance = random.Random(seed)
    program = copy.deepcopy(PROGRAM)
    for _ in range(chance.choice([1, 1, 2])):
        *way, last = chance.choice([each for each in places(program) if each])
        inner: Json = program
        for key in way:
            inner = inner[key]
        what = chance.choice(["wrong", "wrong", "drop", "twice"])
        if what == "drop":
            del inner[last]
        elif what == "twice" and isinstance(inner, list):
            inner.insert(last, inner[last])
        else:
            inner[last] = chance.choice(WRONG)
    try:
        for each in run(make, program):
            each.sum()
    except (
        *(TypeError, ValueError, LookupError, RuntimeError, AssertionError),
        *(OverflowError, SystemError, AttributeError, NotImplementedError, MemoryError),
    ):
        pass


WRONG_PROGRAMS: dict[str, tuple[list[Json], int, int, list[Json]]] = {
    "an argument that is not given": ([], 1, 1, [-3]),
    "no tensors at all": ([["op", "aten::neg.default", [0], [{"t": -1}], {}]], 0, 0, [0]),
    "a value made twice": ([full("1"), full("2")], 0, 0, [0]),
    "a value freed twice": ([full("1"), ["free", [0]], ["free", [0]]], 0, 0, []),
    "more results than there are": ([["op", *full("1")[1:2], [0, 1], *full("1")[3:]]], 0, 0, [0]),
    "fewer than no inputs": ([], -1, 0, []),
    "a piece that is not there": ([["piece", 3, [], [], []]], 0, 0, []),
    "no piece": ([["piece", -1, [], [], []]], 0, 0, []),
    "a step without a name": ([[]], 0, 0, []),
    "a step that is none": ([7], 0, 0, []),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", WRONG_PROGRAMS)
def test_programs_out_of_bounds_are_refused(make: Callable[..., Any], name: str) -> None:
    with pytest.raises((ValueError, LookupError, TypeError, RuntimeError)):
        make([], *WRONG_PROGRAMS[name])


WRONG_STEPS: dict[str, tuple[Json, str]] = {
    "a slot that is not there": (["align", 9, "4", None], "slot 9 before it is filled"),
    "a kernel that is not there": (["kernel", 0, []], "range"),
    "too many arguments": (["kernel", 0, ["1"] * 65], "range|65 arguments"),
    "more sizes than strides": (["view", 1, 0, ["s", "4", "1"], ["1"], "0"], "as many strides"),
    "a dtype that is none": (["empty", 1, 999, ["s"], ["1"]], "dtype"),
    "an asserted dtype that is none": (["dtype", 0, None, None], "dtype"),
    "another dtype": (["dtype", 0, torch.int64, "some.op"], "(?s)expected dtype .* some.op"),
    "an alignment to nothing": (["align", 0, "0", None], "aligned to 0"),
    "no step": (["dance"], "no step is called"),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_wrong_steps_of_pieces_are_errors(make: Callable[..., Any], name: str) -> None:
    step, message = WRONG_STEPS[name]
    piece = {"parameters": [0], "steps": [step], "outputs": [0], "kernels": []}
    with pytest.raises((ValueError, RuntimeError, LookupError, TypeError), match=message):
        run(make, [[piece], [["piece", 0, [-1], [0], []]], 1, 0, [0]])


# --- tensors that change between calls -------------------------------------------------


def test_bound_tensors_may_shrink_and_go(make: Callable[..., Any]) -> None:
    piece = {
        "parameters": [0],
        "steps": [
            ["sizes", 0, ["s", "4"], ["4", "1"], None],
            ["op", "aten::neg.default", [1], [{"t": 0}], {}],
        ],
        "outputs": [1],
        "kernels": [],
    }
    program = make([piece], [["piece", 0, [-1], [0], []]], 0, 1, [0])
    held = torch.ones(3, 4)
    program.bind([held])
    assert torch.equal(program(3)[0], -torch.ones(3, 4))
    held.resize_(1, 4)
    with pytest.raises(AssertionError, match="expected size"):
        program(3)
    held.resize_(3, 4).fill_(2)
    assert torch.equal(program(3)[0], -2 * torch.ones(3, 4))
    held.data = torch.ones(2)
    with pytest.raises(AssertionError):
        program(3)
    held.data = torch.full((3, 4), 3.0)
    del held  # the program holds it
    results = program(3)
    del program
    assert torch.equal(results[0], torch.full((3, 4), -3.0))


def test_a_watch_outlives_what_it_watched() -> None:
    kind = watch_type()
    assert kind is not None
    watch = kind()
    assert not watch()
    tensors = [torch.ones(3, 4) for _ in range(20)]
    if not watch.renew([], [], [], [], [(each, each._cdata, True) for each in tensors]):
        pytest.skip("this Python has no means to watch dicts")
    assert watch()
    tensors[7].untyped_storage().resize_(400)
    assert not watch()
    tensors[7].resize_(100)
    tensors[7].set_(torch.ones(2))
    assert not watch()
    del tensors
    assert not watch()


def test_a_watch_that_is_renewed_while_it_compares() -> None:
    """Comparing keys runs their `__eq__`."""
    kind = watch_type()
    assert kind is not None
    watch = kind()

    class Key:
        def __hash__(self) -> int:
            return 5

        def __eq__(self, other: object) -> bool:
            watch.renew([], [], [], [], [])
            return False

    holder: dict[Any, Any] = {Key(): 1}
    wanted = dict.fromkeys([5, *range(100, 200)], NotImplemented)
    if not watch.renew([], [], [(holder, wanted)], [], []):
        pytest.skip("this Python has no means to watch dicts")
    del wanted
    holder["more"] = 2
    assert watch()
    assert watch()


@pytest.mark.parametrize(
    "wrong",
    [
        ([1], [], [], [], []),
        ([], [], [1], [], []),
        ([], [], [({}, [])], [], []),
        ([], [], [], [([1], 1)], []),
        ([], [], [], [([1],)], []),
        ([], [], [], [], [(1, 2)]),
        ([], [], [], []),
        ({}, [], [], [], []),
    ],
)
def test_a_watch_refuses_what_it_cannot_watch(wrong: tuple[Any, ...]) -> None:
    kind = watch_type()
    assert kind is not None
    watch = kind()
    with pytest.raises((TypeError, SystemError)):
        watch.renew(*wrong)
    assert not watch()
