"""Who holds up the others: told once, over many steps, and never by one pause."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dptrain.runtime import stragglers
from dptrain.runtime.stragglers import StragglerWatch

RECORD = SimpleNamespace(step=20)


def outcome(*busy_s, slow_rank=None, slowness=0.0):
    return SimpleNamespace(busy_s=sum(busy_s) / len(busy_s), slow_rank=slow_rank, slowness=slowness)


def after(own_s, other_s):
    """The slowness of a replica after steps in which it was busy for `own_s`, and the one beside it for `other_s`."""
    watch = StragglerWatch(world_size=2)
    for own, other in zip(own_s, other_s, strict=True):
        watch.note(own)
        assert watch.learn(outcome(own, other), RECORD) is None
    return watch.slowness


@pytest.mark.parametrize(("own_s", "slowness"), [(0.3, 3.0), (0.12, 0.0), (0.05, 0.0)])
def test_slowness_is_own_time_to_that_of_the_others(own_s, slowness):
    """Three times as slow is 3; a fifth slower, or faster, is nothing to speak of."""
    assert after([own_s] * 20, [0.1] * 20) == pytest.approx(slowness)


def test_one_pause_and_tiny_steps_are_no_slowness():
    """A second's pause in twenty steps of half a second, and differences below the scheduler's."""
    assert after([0.5] * 19 + [1.5], [0.5] * 20) == 0
    assert after([0.002] * 20, [0.0005] * 20) == 0


def test_a_straggler_is_told_once():
    """All replicas hear of it in each step, and say it when it is new."""
    watch = StragglerWatch(world_size=3)
    told = [watch.learn(outcome(0.1, 0.1, 0.3, slow_rank=2, slowness=3.0), RECORD) for _ in range(3)]
    assert told[0].startswith("rank 2 is a straggler")
    assert told[1:] == [None, None]


def test_who_is_alone_gathers_nothing():
    """One replica has nobody to compare with, however long it runs."""
    watch = StragglerWatch(world_size=1)
    for _ in range(3 * stragglers._STEPS):
        watch.note(1.0)
        assert watch.learn(outcome(1.0), RECORD) is None
    assert not watch._sent
