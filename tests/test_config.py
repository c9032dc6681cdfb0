import dataclasses

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splitpoint
from splitpoint import Config, errors
from splitpoint.passes.noop import NoopElimination


class Doubling(splitpoint.Pass):
    def __init__(self, factor=2):
        self.factor = factor

    def settings(self):
        return {"factor": self.factor}

    def __call__(self, graph):
        return 0

    def __eq__(self, other):
        return isinstance(other, Doubling) and other.factor == self.factor

    __hash__ = None


@pytest.mark.parametrize("field", ["split_points", "compile_sizes"])
@pytest.mark.parametrize(
    ("points", "error", "said"),
    [
        ([8, 0], errors.NonPositivePoint, "0"),
        ([-3], errors.NonPositivePoint, "-3"),
        ([8, 8], errors.DuplicatePoint, "8"),
        ([8, 32, 8], errors.DuplicatePoint, "8"),
        ([32, 8], errors.UnsortedPoints, r"\[8, 32\]"),
        ([8, 101], errors.PointAboveMax, "101"),
        ([8.0], errors.NonIntegerPoint, "8.0"),
        ([True], errors.NonIntegerPoint, "True"),
        (["8"], errors.NonIntegerPoint, "'8'"),
        ("8", errors.InvalidField, "'8'"),
        (8, errors.InvalidField, "8"),
    ],
)
def test_points_that_cannot_be_used(field, points, error, said):
    with pytest.raises(error, match=said) as caught:
        Config(max_size=100, **{field: points})
    assert field in str(caught.value)
    assert isinstance(caught.value, (errors.ConfigError, ValueError))


@pytest.mark.parametrize("value", [0, -1, 2**20 + 1, 3.5, True, "8", None])
def test_max_size_that_cannot_be_used(value):
    with pytest.raises(errors.InvalidMaxSize, match="max_size"):
        Config(max_size=value)


@pytest.mark.parametrize(
    "field", ["on_guard", "on_out_of_plan", "backend", "hint", "module_guards"]
)
def test_choices_name_the_choices(field):
    with pytest.raises(errors.InvalidField, match=f"{field} must be one of .*, got 'perhaps'"):
        Config(**{field: "perhaps"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lazy", 1),
        ("passes", [NoopElimination]),
        ("passes", NoopElimination()),
        ("passes", ["NoopElimination"]),
        ("splitting_ops", "aten::mm"),
        ("splitting_ops", [3]),
        ("inductor_options", [1]),
        ("inductor_options", {3: 4}),
        ("inductor_options", {"1-8": 4}),
        ("inductor_options", {"8-1": {}}),
    ],
)
def test_fields_of_the_wrong_kind(field, value):
    with pytest.raises(errors.InvalidField, match=field):
        Config(**{field: value})


def test_a_pass_class_instead_of_an_object_says_how_to_mend_it():
    with pytest.raises(errors.InvalidField, match=r"write NoopElimination\(\)"):
        Config(passes=[NoopElimination])


def test_vllm_names():
    for name in ("compile_ranges_split_points", "compile_ranges_endpoints"):
        assert Config(max_size=64, **{name: [8, 32]}).split_points == (8, 32)
        assert Config.from_json(f'{{"{name}": [8]}}').split_points == (8,)
    with pytest.raises(errors.ConflictingFields, match="split_points"):
        Config(split_points=[8], compile_ranges_split_points=[9])
    assert Config(split_points=[8], compile_ranges_endpoints=[8]).split_points == (8,)


def test_numpy_integers_are_integers():
    config = Config(split_points=list(numpy.array([8, 32])))
    assert config.split_points == (8, 32)
    assert all(type(point) is int for point in config.split_points)


def test_config_is_frozen_and_holds_no_list_of_the_caller():
    given_points = [8]
    config = Config(split_points=given_points)
    given_points.append(7)
    assert config.split_points == (8,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_size = 3


@given(
    st.integers(1, 4096).flatmap(
        lambda top: st.fixed_dictionaries(
            {
                "max_size": st.just(top),
                "split_points": st.lists(st.integers(1, top), unique=True, max_size=5).map(sorted),
                "compile_sizes": st.lists(st.integers(1, top), unique=True, max_size=5).map(sorted),
                "on_guard": st.sampled_from(["split", "error"]),
                "on_out_of_plan": st.sampled_from(["error", "eager"]),
                "backend": st.sampled_from(["inductor", "eager"]),
                "lazy": st.booleans(),
                "hint": st.sampled_from(["start", "middle", "end"]),
                "splitting_ops": st.lists(st.sampled_from(["aten::mm", "flex_attention"])),
                "inductor_options": st.sampled_from(
                    [{}, {"max_autotune": True}, {"1-8": {"epilogue_fusion": False}}]
                ),
                "passes": st.lists(st.builds(Doubling, st.integers(1, 5)), max_size=2),
            }
        )
    )
)
def test_json_round_trip(fields):
    config = Config(**fields)
    again = Config.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()


def test_json_that_cannot_be_read():
    with pytest.raises(errors.InvalidJSON):
        Config.from_json("{")
    with pytest.raises(errors.InvalidJSON):
        Config.from_json("[]")
    with pytest.raises(errors.UnknownField, match=r"splitpoints.*split_points"):
        Config.from_json('{"splitpoints": [8]}')
    for entry in ('"x"', '{"pass": "nowhere:X"}', '{"pass": "json:loads"}'):
        with pytest.raises(errors.InvalidJSON):
            Config.from_json(f'{{"passes": [{entry}]}}')
    wrong = '{"passes": [{"pass": "splitpoint.passes.noop:NoopElimination", "settings": {"a": 1}}]}'
    with pytest.raises(errors.InvalidJSON):
        Config.from_json(wrong)


def test_a_local_pass_cannot_be_written():
    class Local(Doubling):
        pass

    with pytest.raises(errors.NotSerializable, match="Local"):
        Config(passes=[Local()]).to_json()


def test_options_of_a_range_win_over_common_ones():
    config = Config(
        max_size=64,
        split_points=[8],
        inductor_options={"epilogue_fusion": True, "1-8": {"epilogue_fusion": False}},
    )
    small, large = config.plan().entries
    assert small.options == {"epilogue_fusion": False}
    assert large.options == {"epilogue_fusion": True}


def test_every_error_is_the_librarys_own_and_explained():
    kinds = [v for v in vars(errors).values() if isinstance(v, type)]
    assert len(kinds) > 30
    for kind in kinds:
        assert issubclass(kind, errors.SplitpointError)
        assert kind.__module__ == "splitpoint.errors"
        assert kind.__doc__


def test_keys_that_hold_no_range_are_said() -> None:
    config = Config(
        max_size=64,
        split_points=[8],
        linear={"1-4": "packed", "1-8": "packed"},
        inductor_options={"100-200": {"max_autotune": True}},
    )
    assert config.plan().notes == (
        "linear['1-4'] changes nothing: no range of the plan lies in it",
        "inductor_options['100-200'] changes nothing: no range of the plan lies in it",
    )


def test_an_unknown_field_is_told_its_neighbour() -> None:
    with pytest.raises(errors.UnknownField, match="no field 'max_sise': did you mean 'max_size'"):
        Config.from_dict({"max_sise": 4})
