"""What a sweep may be asked for, and which runs that names."""

from __future__ import annotations

import math

import pytest

from dptrain.errors import ConfigError
from dptrain.sweep import SweepSpec


def spec(**changes):
    given = {
        "batch_sizes": [8, 32],
        "targets": [0.5, 0.3],
        "seeds": [0, 1],
        "learning_rates": None,
        "base_batch_size": 8,
        "base_learning_rate": 0.01,
        "base_samples": 1000,
        "exponent": 0.5,
    }
    return SweepSpec(**{**given, **changes})


def test_the_first_guess_follows_the_rule():
    """Four times the batch: twice the rate by the square root, four times by the linear rule."""
    assert [spec().run(32, grid_point=grid_point, seed=0).learning_rate for grid_point in spec().first_grid_points] == [
        0.01,
        0.02,
        0.04,
    ]
    assert spec(exponent=1.0).run(32, grid_point=0, seed=0).learning_rate == 0.04
    assert spec(exponent=0.0).run(32, grid_point=3, seed=0).learning_rate == 0.08


def test_a_rate_is_what_the_name_says():
    """Four digits are all that it has, so two runs of one name are one run."""
    run = spec(base_learning_rate=1 / 3).run(32, grid_point=0, seed=7)
    assert run.learning_rate == 0.6667
    assert run.name == "batch-32-lr-0.6667-seed-7"
    names = {spec().run(8, grid_point=grid_point, seed=0).name for grid_point in range(-12, 13)}
    assert len(names) == 25


def test_listed_rates_are_taken_as_they_are():
    """At every batch, and no other."""
    listed = spec(learning_rates=[0.001, 0.0123456])
    assert [listed.run(32, grid_point=grid_point, seed=0).learning_rate for grid_point in listed.first_grid_points] == [
        0.001,
        0.0123456,
    ]
    assert [grid_point for grid_point in range(-3, 5) if listed.has_grid_point(grid_point)] == [0, 1]


def test_the_search_ends_somewhere():
    """After some four thousandfold to either side."""
    assert spec().has_grid_point(12)
    assert not spec().has_grid_point(13)


def test_a_longer_run_for_a_larger_batch():
    """As many steps as at the base batch, and at least as many samples."""
    assert [spec().max_samples(batch) for batch in (1, 8, 16, 800)] == [1000, 1000, 2000, 100_000]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_sizes": [0, 8]}, "global batches must be at least 1, got 0, 8"),
        ({"batch_sizes": []}, "got none"),
        ({"batch_sizes": [8, 8]}, "once, got 8, 8"),
        ({"targets": [math.inf]}, "targets must be finite"),
        ({"targets": [math.nan]}, "targets must be finite"),
        ({"targets": []}, "targets must be finite, got none"),
        ({"targets": [0.5, 0.5]}, "once"),
        ({"seeds": [-1]}, "seeds must be at least 0"),
        ({"learning_rates": [0.0, 1.0]}, "learning rates must be positive"),
        ({"learning_rates": [math.inf]}, "learning rates must be positive"),
    ],
)
def test_nonsense_is_refused(changes, said):
    """In one sentence with the values."""
    with pytest.raises(ConfigError, match=said):
        spec(**changes)
