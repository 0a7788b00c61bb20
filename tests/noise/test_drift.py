"""Proves that filters of several memories follow a course and say how well they know it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptrain.noise import drift as drifts


def followed(values, noise):
    """Return the state after all values, and the mean at present with its variance."""
    state = drifts.begun(values[0], flicker=drifts.GRAD_FLICKER)
    for step, value in enumerate(values[1:], start=2):
        state = drifts.updated(
            state,
            value,
            level=drifts.level_of(state.memories),
            noise=noise,
            rescale=1.0,
            step=step,
            flicker=drifts.GRAD_FLICKER,
        )
    mean, variance = drifts.present(state, noise=noise, step=len(values))
    return state, mean, variance


def test_a_constant_course_is_known_almost_as_well_as_by_its_plain_mean():
    """The mean of 1,000 values is found, and its standard error is at most a fifth wider than theirs."""
    values = 5 + np.random.default_rng(1).standard_normal(1000)
    _, mean, variance = followed(values.tolist(), 1.0)
    assert mean == pytest.approx(values.mean(), abs=0.03)
    assert 1 / 1000 <= variance < 1.44 / 1000


def test_a_falling_course_is_followed_to_its_end():
    """100 that falls to 10 over the run is read as what it is at the end, not as the mean of the last fifth."""
    truth = 100 * 10 ** -(np.arange(1, 1001) / 1000)
    values = truth + 3 * np.random.default_rng(2).standard_normal(1000)
    _, mean, variance = followed(values.tolist(), 9.0)
    assert abs(mean - truth[-20:].mean()) < 3 * math.sqrt(variance)
    assert truth[-200:].mean() - mean > 3 * math.sqrt(variance)


def test_after_a_jump_the_plain_mean_starts_anew():
    """Forty steps after a fall to a tenth the old level is gone, and the infinite memory is believed again."""
    values = np.concatenate([np.full(500, 10.0), np.full(40, 1.0)])
    values += 0.3 * np.random.default_rng(3).standard_normal(540)
    state, mean, variance = followed(values.tolist(), 0.09)
    assert mean == pytest.approx(1.0, abs=3 * math.sqrt(variance))
    assert state.memories[0][5] > 0.3
    assert state.memories[0][0] == pytest.approx(1.0, abs=0.3)


def test_a_lone_spike_is_drawn_in_and_two_in_a_row_pass():
    """One value of 1,000 standard errors moves the mean by less than two of its errors; a second one is believed."""
    calm = np.random.default_rng(4).standard_normal(400).tolist()
    _, before, variance = followed(calm, 1.0)
    state, after, _ = followed([*calm, 1000.0], 1.0)
    assert abs(after - before) < 2 * math.sqrt(variance)
    assert state.lone == pytest.approx(1 / 401)
    twice, _, _ = followed([*calm, 1000.0, 1000.0], 1.0)
    assert drifts.level_of(twice.memories) > 10
    assert twice.lone == pytest.approx(1 / 402)


def flickering(rng, num_steps, *, size, memory=0.8):
    """Return a level of 10 with an autoregressive flicker of `size` a step, in units of the level."""
    walk = np.zeros(num_steps)
    for step in range(1, num_steps):
        walk[step] = memory * walk[step - 1] + size * math.sqrt(1 - memory**2) * rng.standard_normal()
    return 10 * (1 + walk)


def test_the_mean_over_the_present_is_held_where_the_course_flickers():
    """Of 40 runs 35 at least hold the mean of their last 20 steps in two errors; 15 % in it is flicker, 1 % noise."""
    rng, inside, believed = np.random.default_rng(5), 0, []
    for _ in range(40):
        truth = flickering(rng, 240, size=0.25)
        state, mean, variance = followed((truth + 0.5 * rng.standard_normal(240)).tolist(), 0.25)
        inside += abs(mean - truth[-20:].mean()) < 2 * math.sqrt(variance)
        believed.append(sum(b * size for b, size in zip(state.flicker, drifts.FLICKERS, strict=True)))
    assert inside >= 35
    assert 0.08 < np.median(believed) < 0.3


def test_a_course_without_flicker_is_known_for_one():
    """After 400 steps whose mean over 20 is known to 1 %, a flicker of a tenth or more has 2 % of belief at most."""
    values = 10 + 0.5 * np.random.default_rng(6).standard_normal(400)
    state, _, _ = followed(values.tolist(), 0.25)
    assert sum(state.flicker[2:]) < 0.02


def test_in_the_first_forty_steps_flicker_has_no_part():
    """The present is most of the run there: the error is that of the plain mean, to a fifth."""
    values = 10 + np.random.default_rng(7).standard_normal(40)
    _, _, variance = followed(values.tolist(), 1.0)
    assert variance == pytest.approx(1 / 40, rel=0.4)


def test_the_present_is_a_hundredth_of_the_run_and_twenty_steps_at_least():
    """Twenty up to 2,000 steps; from there on a hundredth."""
    assert [drifts.now_steps(step) for step in (1, 2000, 10_000)] == [20, 20, 100]


@pytest.mark.parametrize("value", [0.0, 1e-100, -1e100])
def test_signals_without_noise_do_no_harm(value):
    """The same value at every step is found, whatever its size, though its noise is none."""
    _, mean, variance = followed([value] * 60, 1e-300)
    assert mean == pytest.approx(value)
    assert math.isfinite(variance)
