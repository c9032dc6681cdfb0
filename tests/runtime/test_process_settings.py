"""A process-wide setting, changed by several for a while."""

import itertools

import pytest

from splitpoint.runtime.process_settings import Lent


@pytest.mark.parametrize("ends", list(itertools.permutations(range(3))))
def test_what_it_was_comes_back_with_the_last_whichever_that_is(ends):
    value = [5]
    lent = Lent(lambda: value[0], lambda given: value.__setitem__(0, given))
    users = [lent.at(lambda before, less=less: before - less) for less in (1, 2, 3)]
    for user in users:
        user.__enter__()
    assert value == [2]
    for count, user in enumerate(ends):
        users[user].__exit__(None, None, None)
        assert (value == [5]) is (count == 2)
    with lent.at(lambda before: before + 1):
        assert value == [6]
    assert value == [5]


def test_it_comes_back_after_an_error():
    value = [5]
    lent = Lent(lambda: value[0], lambda given: value.__setitem__(0, given))
    with pytest.raises(KeyError), lent.at(lambda _: 0):
        raise KeyError
    assert value == [5]
