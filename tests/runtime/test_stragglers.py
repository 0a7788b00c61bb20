"""A straggler is reported once, on evidence that lasts: many steps, several seconds, and always the same rank."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from dptrain.runtime.stragglers import NUM_WINDOWS, WINDOW_S, WINDOW_STEPS, StragglerWatch


def outcome(*busy_s, slow_rank=None, slowness=0.0):
    return SimpleNamespace(busy_s=sum(busy_s) / len(busy_s), slow_rank=slow_rank, slowness=slowness)


class Ranks:
    """Two watches that hear of each other as in a run, and what was reported."""

    def __init__(self):
        self.watches = [StragglerWatch(world_size=2) for _ in range(2)]
        self.reports = []
        self.wall_s, self.step = 0.0, 0

    def take(self, own_s, other_s, *, step_s=0.1):
        times = (own_s, other_s)
        self.step, self.wall_s = self.step + 1, self.wall_s + step_s
        for watch, busy_s in zip(self.watches, times, strict=True):
            watch.note(busy_s)
        slow = [rank for rank, watch in enumerate(self.watches) if watch.slowness > 0]
        rank = slow[0] if len(slow) == 1 else None
        found = outcome(*times, slow_rank=rank, slowness=0 if rank is None else self.watches[rank].slowness)
        record = SimpleNamespace(step=self.step, wall_s=self.wall_s)
        reported = [watch.learn(found, record) for watch in self.watches]
        assert reported[0] == reported[1]  # every rank says the same
        self.reports += reported[:1] if reported[0] else []


def steps_for(windows, step_s=0.1):
    return round(windows * max(WINDOW_S / step_s, WINDOW_STEPS)) + windows + 1


def test_a_rank_that_stays_slow_is_reported_once():
    """With its rank and how much longer its forward passes take."""
    ranks = Ranks()
    for _ in range(steps_for(2 * NUM_WINDOWS)):
        ranks.take(0.03, 0.09)
    (report,) = ranks.reports
    assert report.startswith("rank 1 slow: forward time 3× that of the other ranks")


@pytest.mark.parametrize("seconds", [1, 4, 9])
def test_a_burst_of_contention_is_not_reported(seconds):
    """A neighbour that takes a core for some seconds slows one rank by ten, and is no straggler."""
    ranks = Ranks()
    for begin in range(0, 60, 20):
        for _ in range(round((20 - seconds) / 0.1)):
            ranks.take(0.03, 0.03)
        for _ in range(round(seconds / 0.1)):
            ranks.take(*((0.3, 0.03) if begin % 40 else (0.03, 0.3)))
    assert ranks.reports == []


def test_a_healthy_run_on_busy_cores_reports_nobody():
    """Ranks that are slowed in turn for a few seconds each, as by a scheduler, for ten minutes in each of 20 runs."""
    rng = random.Random(0)
    for _ in range(20):
        ranks = Ranks()
        while ranks.wall_s < 600:
            slowed = rng.randrange(2)
            for _ in range(round(rng.expovariate(1 / 3.0) / 0.1) + 1):
                times = [0.03 * rng.lognormvariate(0, 0.3) * (1.8 if rank == slowed else 1) for rank in range(2)]
                ranks.take(*times)
        assert ranks.reports == []


def test_pauses_do_not_make_a_straggler():
    """A second's pause in nine of twenty steps is no persistent slowness."""
    ranks = Ranks()
    for step in range(steps_for(2 * NUM_WINDOWS)):
        ranks.take(0.03, 1.0 if step % 20 < 9 else 0.03)
    assert ranks.reports == []


@pytest.mark.parametrize(("own_s", "other_s"), [(0.03, 0.036), (0.0005, 0.0019), (0.03, 0.03)])
def test_small_differences_are_not_reported(own_s, other_s):
    """A fifth slower, or times of which the scheduler is the larger part."""
    ranks = Ranks()
    for _ in range(steps_for(2 * NUM_WINDOWS)):
        ranks.take(own_s, other_s)
    assert ranks.reports == []


def test_a_single_replica_collects_nothing():
    """It has nobody to compare with, however long it runs."""
    watch = StragglerWatch(world_size=1)
    for step in range(3 * WINDOW_STEPS):
        watch.note(1.0)
        assert watch.learn(outcome(1.0), SimpleNamespace(step=step, wall_s=10.0 * step)) is None
    assert not watch._sent
