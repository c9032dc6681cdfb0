"""That loading sets off no collection, and that nothing of the collector's state is lost."""

import gc
import weakref

from splitpoint.garbage import no_collection


class Cycle:
    def __init__(self):
        self.itself = self


def test_what_is_made_sets_off_no_collection_inside_or_at_the_end():
    runs = []

    def note(phase, info):
        runs.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with no_collection():
            kept = [[] for _ in range(5 * gc.get_threshold()[0])]
        after = [[] for _ in range(10)]
    finally:
        gc.callbacks.pop()
    assert runs == []
    assert gc.isenabled()
    assert len(kept) > len(after)


def test_garbage_made_meanwhile_is_found_by_a_later_collection():
    with no_collection():
        lost = weakref.ref(Cycle())
    assert lost() is not None
    gc.collect()
    assert lost() is None


def test_it_stays_as_the_program_set_it():
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    frozen = [[]]
    gc.freeze()
    try:
        with no_collection():
            made = [[]]
        found = gc.get_objects()  # all but frozen ones
        assert any(each is made for each in found)
        assert not any(each is frozen for each in found)
    finally:
        gc.unfreeze()
