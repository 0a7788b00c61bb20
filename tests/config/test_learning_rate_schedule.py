"""The base learning rate against position: textbook formulas, ends, and settings that have no meaning together."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.config.learning_rate_schedule import LearningRateSchedule
from dptrain.errors import ConfigError


@given(st.floats(0, 1e6))
def test_schedule_is_a_closed_form(position):
    """At every position the factor is the textbook formula of that position alone."""
    settings = {"warmup_samples": 1000, "max_samples": 101_000, "final_fraction": 0.1}
    warm = min(position / 1000, 1)
    done = min(max(position - 1000, 0) / 100_000, 1)
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    assert LearningRateSchedule(warmup_samples=1000).factor(position) == pytest.approx(warm)
    assert LearningRateSchedule(kind="cosine", **settings).factor(position) == pytest.approx(warm * cosine)
    linear = LearningRateSchedule(kind="linear", **settings).factor(position)
    assert linear == pytest.approx(warm * (1 - 0.9 * done))
    fallen = min(max(position - 75_750, 0) / 25_250, 1)
    wsd = LearningRateSchedule(kind="wsd", decay_fraction=0.25, **settings).factor(position)
    assert wsd == pytest.approx(warm * (1 - 0.9 * fallen))


def test_wsd():
    """Warm-up, stable, decay: constant up to the last fifth of the run, then straight down."""
    schedule = LearningRateSchedule(kind="wsd", warmup_samples=100, max_samples=1000)
    assert [schedule.factor(p) for p in (50, 100, 500, 800)] == pytest.approx([0.5, 1, 1, 1])
    assert [schedule.factor(p) for p in (900, 1000, 2000)] == pytest.approx([0.5, 0, 0])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedule_ends(kind):
    """Without warm-up the rate begins at its full height, ends at the final fraction and stays there."""
    schedule = LearningRateSchedule(kind=kind, max_samples=1000)
    assert schedule.factor(0) == 1
    assert schedule.factor(500) == pytest.approx(0.5)
    assert schedule.factor(1000) == pytest.approx(0)
    assert schedule.factor(5000) == pytest.approx(0)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "step"},
        {"warmup_samples": -1},
        {"final_fraction": 0.1},
        {"kind": "cosine"},
        {"kind": "linear", "max_samples": 100, "warmup_samples": 100},
        {"kind": "linear", "max_samples": 100, "final_fraction": 1.5},
        {"kind": "cosine", "max_samples": 100, "decay_fraction": 0.5},
        {"kind": "wsd"},
        {"kind": "wsd", "max_samples": 100, "decay_fraction": 0.0},
        {"kind": "wsd", "max_samples": 100, "decay_fraction": 1.1},
        {"kind": "wsd", "max_samples": 100, "warmup_samples": 60, "decay_fraction": 0.5},
    ],
)
def test_schedule_settings_out_of_range(settings):
    """Settings that have no meaning together are refused."""
    with pytest.raises(ConfigError):
        LearningRateSchedule(**settings)
