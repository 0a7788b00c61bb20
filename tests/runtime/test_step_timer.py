"""How steps are timed: from one beginning to the next, without what was no training, as a mean over the replicas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dptrain.runtime.step_reduction import StepRecord
from dptrain.runtime.step_timer import StepTimer


def record(step, wall_s, *, batch=8):
    return StepRecord(
        step=step, position=0, global_batch_size=batch, micro_batch_size=2, learning_rate=0.1, wall_s=wall_s
    )


def outcome(step_s):
    return SimpleNamespace(step_s=step_s)


def test_a_step_lasts_until_the_next_begins():
    """The interval is that of the step before; of the first step there is none, and of a step under way neither."""
    step_timer = StepTimer(world_size=2)
    first, second = record(1, 10.0), record(2, 10.5)
    step_timer.began(first)
    assert (step_timer.interval_s, step_timer.interval_of(first)) == (None, None)
    step_timer.began(second)
    assert (step_timer.interval_s, step_timer.interval_of(first), step_timer.interval_of(second)) == (0.5, 0.5, None)


def test_a_pause_is_no_step_time():
    """A step in which something else took time is not timed; the one after it is."""
    step_timer = StepTimer(world_size=1)
    step_timer.began(record(1, 0.0))
    step_timer.disturbed()
    step_timer.began(record(2, 60.0))
    assert step_timer.interval_s is None
    step_timer.began(record(3, 61.0))
    assert step_timer.interval_s == 1.0


def test_the_time_belongs_to_the_shape_of_the_step_before():
    """What comes back with a step tells of the one before it, and goes to that one's shape."""
    step_timer = StepTimer(world_size=2)
    for step in range(1, 40):
        step_timer.began(record(step, float(step), batch=8 if step < 20 else 32))
        if step > 1:
            # The step before had 8 samples up to step 20, and took 1 s; then 32, and took 4 s.
            step_timer.learn(record(step, float(step)), outcome(1.0 if step <= 20 else 4.0))
    seconds = {
        shape["shape"]["accumulation_steps"]: set(shape["seconds"]) for shape in step_timer.state()["times"]["shapes"]
    }
    assert seconds == {2: {1.0}, 8: {4.0}}


def test_a_new_shape_counts_as_soon_as_it_is_known():
    """A batch that grows three times in twenty steps must not do so by what was known before the first of them."""
    step_timer, models = StepTimer(world_size=2), []
    batches = [8] * 24 + [16] * 22 + [64] * 6
    for step, batch in enumerate(batches, start=1):
        step_timer.began(record(step, float(step), batch=batch))
        if step > 1:
            step_timer.learn(record(step, float(step), batch=batch), outcome(2.0 if batches[step - 2] < 64 else 8.0))
        models.append(step_timer.model)
    # The first step at 64 is left out, and three are timed; each is known when the next one begins.
    seconds_at_64 = [model.step_s(micro_batch_size=2, accumulation_steps=16) for model in models[-6:]]
    assert max(seconds_at_64[:4]) < 3
    assert min(seconds_at_64[4:]) > 4


def test_what_not_all_replicas_timed_is_not_learned():
    """Without a time from each the mean would be another thing."""
    step_timer = StepTimer(world_size=2)
    for step in range(1, 20):
        step_timer.began(record(step, float(step)))
        step_timer.learn(record(step, float(step)), outcome(None))
    assert step_timer.model is None


def test_it_goes_on_from_its_state():
    """A resumed run knows the times that were measured before."""
    step_timer, other = StepTimer(world_size=2), StepTimer(world_size=2)
    for step in range(1, 20):
        step_timer.began(record(step, 0.3 * step))
        step_timer.learn(record(step, 0.3 * step), outcome(0.3))
    other.restore(step_timer.state())
    assert other.model == step_timer.model
    assert other.model.step_s(micro_batch_size=2, accumulation_steps=2) == pytest.approx(0.3)
