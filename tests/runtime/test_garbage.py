"""Python's garbage collection between steps: never in one, at fixed steps, and as before afterwards."""

from __future__ import annotations

import gc

import pytest

from dptrain.runtime.garbage import GarbageCollection


class Cycle:
    """Is collected only by the cyclic collector, and notes that."""

    gone = 0

    def __init__(self):
        self.itself = self

    def __del__(self):
        type(self).gone += 1


def test_garbage_goes_at_the_steps_that_are_due_and_at_no_other():
    """With an interval of 10, cycles made in every step go at steps 10 and 20."""
    Cycle.gone = 0
    collection = GarbageCollection(10)
    counts = []
    with collection.held():
        for step in range(1, 21):
            for _ in range(100):
                Cycle()
            collection.stepped(step)
            counts.append(Cycle.gone)
    assert counts[8] == 0
    assert counts[9] == 1000
    assert counts[18] == 1000
    assert counts[19] == 2000
    assert gc.isenabled()


def test_an_error_gives_the_collector_back():
    """What training raises leaves Python as it was."""
    with pytest.raises(ZeroDivisionError), GarbageCollection(10).held():
        1 / gc.isenabled()
    assert gc.isenabled()


def test_zero_leaves_it_to_python():
    """Nothing is switched off, nothing is collected by us."""
    with GarbageCollection(0).held():
        assert gc.isenabled()
