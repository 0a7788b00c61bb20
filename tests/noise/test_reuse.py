"""Proves that the bias of samples that are used again is found from the place in the epoch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dptrain.errors import ConfigError
from dptrain.noise.reuse import ReuseState, reuse_bias, reuse_updated, reuse_warning, skipped


def epochs(profile, *, num_epochs=10, population=512, batch=16, spread=0.3, seed=0):
    """Return the state after epochs in which |G|² follows `profile` of the position, with a scatter of `spread`."""
    rng, state = np.random.default_rng(seed), ReuseState()
    for step in range(num_epochs * population // batch):
        u = step * batch % population / population
        value = 2 * profile(u) * (1 + spread * rng.standard_normal())
        state = reuse_updated(
            state, grad_sq_norm=value, window_mean=2.0, num_samples=float(batch), population=population
        )
    return state


def test_a_rise_within_the_epoch_is_the_bias():
    """|G|² that doubles from start to end of each epoch reads half too much over whole epochs."""
    found = reuse_bias(epochs(lambda u: 1 + u), present_samples=512.0, population=512)
    assert found.matters
    assert found.relative == pytest.approx(0.5, abs=3 * found.error)
    assert found.error < 0.25


def test_at_the_end_of_an_epoch_it_is_larger():
    """Over the last quarter of the epoch the same rise is a bias of 7/8."""
    found = reuse_bias(epochs(lambda u: 1 + u, spread=0.05), present_samples=128.0, population=512)
    assert found.relative == pytest.approx(0.875, abs=0.1)


def test_no_rise_is_no_bias():
    """Of 20 flat profiles at most two are taken for a bias."""
    found = [reuse_bias(epochs(lambda _: 1.0, seed=seed), present_samples=512.0, population=512) for seed in range(20)]
    assert sum(bias.matters for bias in found) <= 2


def test_the_first_epoch_says_nothing():
    """Nothing is used again before the data were seen once."""
    assert reuse_bias(epochs(lambda u: 1 + u, num_epochs=1), present_samples=512.0, population=512) is None


def test_steps_that_are_not_measured_move_the_position():
    """A skipped step counts its samples."""
    assert skipped(ReuseState(position=10.0), num_samples=6.0).position == 16


def test_the_record_goes_through_json():
    """It reads back the same, and a foreign one is refused."""
    state = epochs(lambda u: 1 + u, num_epochs=2)
    assert ReuseState.from_json(json.loads(json.dumps(state.to_json()))) == state
    with pytest.raises(ConfigError, match="position"):
        ReuseState.from_json({})


def test_linear_regression_over_epochs_of_a_small_set():
    """Problem 14: the |G|² read is several times the exact one, and the reading warns that it may be too large."""
    from dptrain.noise import MomentSums, Smoothing, SquaredNorms, smoothed, unbiased_moments

    rng = np.random.default_rng(14)
    D, d, batch, rate = 400, 200, 20, 0.002
    x = rng.standard_normal((D, d))
    y = x @ rng.standard_normal(d) / d**0.5 + rng.standard_normal(D)
    w, window, state = np.zeros(d), MomentSums(), ReuseState()
    exact, read = [], []
    for epoch in range(12):
        order = rng.permutation(D)
        for start in range(0, D, batch):
            rows = order[start : start + batch]
            halves = [x[part].T @ (x[part] @ w - y[part]) / len(part) for part in np.split(rows, 2)]
            mean = sum(halves) / 2
            norms = SquaredNorms.of([float(g @ g) for g in halves], sizes=[10, 10], large_sq_norm=float(mean @ mean))
            moments = unbiased_moments(norms, population=D)
            window = Smoothing().update(window, moments)
            state = reuse_updated(
                state,
                grad_sq_norm=moments.grad_sq_norm,
                window_mean=smoothed(window).grad_sq_norm,
                num_samples=float(batch),
                population=D,
            )
            if epoch >= 8:
                whole = x.T @ (x @ w - y) / D
                exact.append(float(whole @ whole))
                read.append(moments.grad_sq_norm)
            w -= rate * batch * mean
    assert np.mean(read) > 2 * np.mean(exact)
    assert "used again" in reuse_warning(state, present_samples=float(D), population=D)


def test_the_reading_says_by_how_much():
    """A rise that is known is reported with its error; before the second epoch nothing is."""
    state = epochs(lambda u: 1 + u, spread=0.05)
    assert "|G|² reads 5" in reuse_warning(state, present_samples=512.0, population=512)
    assert reuse_warning(ReuseState(position=512.0), present_samples=512.0, population=512) is None
    flat = epochs(lambda _: 1.0, spread=0.02)
    assert reuse_warning(flat, present_samples=512.0, population=512) is None
