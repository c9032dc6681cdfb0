"""That starting sets off few collections, and that nothing of the collector's state is lost."""

import gc
import weakref

import pytest

from splitpoint.runtime.garbage import RARE, no_collection, rare_collection

both = pytest.mark.parametrize("fewer", [no_collection, rare_collection])


class Cycle:
    def __init__(self):
        self.itself = self


@both
def test_what_is_made_sets_off_no_collection_inside_or_at_the_end(fewer):
    runs = []
    count = 5 * gc.get_threshold()[0]

    def note(phase, info):
        runs.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with fewer():
            kept = [[] for _ in range(count)]
        after = [[] for _ in range(10)]
    finally:
        gc.callbacks.pop()
    assert runs == []
    assert gc.isenabled()
    assert len(kept) > len(after)


def test_thresholds_come_back_when_the_last_ends_in_whatever_order():
    before = gc.get_threshold()
    first, second = rare_collection(), rare_collection()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() == RARE
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


@both
def test_garbage_made_meanwhile_is_found_by_a_later_collection(fewer):
    with fewer():
        lost = weakref.ref(Cycle())
    assert lost() is not None
    gc.collect()
    assert lost() is None


@both
def test_it_stays_as_the_program_set_it(fewer):
    before = gc.get_threshold()
    gc.disable()
    try:
        with fewer():
            pass
        assert not gc.isenabled()
        assert gc.get_threshold() == before
    finally:
        gc.enable()
    frozen = [[]]
    gc.freeze()
    try:
        with fewer():
            made = [[]]
        found = gc.get_objects()  # all but frozen ones
        assert any(each is made for each in found)
        assert not any(each is frozen for each in found)
    finally:
        gc.unfreeze()
