"""The adaptive side of the frontier, against fixed batches and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.frontier.curves import NOISE_COURSES, DampedQuadratic
from dptrain.errors import ConfigError
from dptrain.explain.model.adaptive import adaptive_side


def side_of(run):
    steps = np.ones(len(run.noise_scales))
    steps[-1] = run.num_steps - (len(steps) - 1)
    return adaptive_side(noise_scales=run.noise_scales, global_batch_sizes=run.batch_sizes, num_steps=steps)


def test_a_fixed_batch_has_the_product_one():
    """Whatever the noise scale does on the way: that is the hyperbola."""
    scales = np.random.default_rng(0).lognormal(3, 1, 50)
    for batch in (1.0, 30.0, 1000.0):
        side = adaptive_side(noise_scales=scales, global_batch_sizes=batch)
        assert side.product == pytest.approx(1)
        assert side.gamma <= 1
        assert (side.steps, side.samples) == (50, 50 * batch)


@pytest.mark.parametrize("name", [name for name in NOISE_COURSES if name != "constant"])
@pytest.mark.parametrize("exchange_rate", [0.01, 1.0])
def test_the_square_root_law_reaches_gamma(name, exchange_rate):
    """At any exchange rate a run of batches √(r·φ) has the product of the closed form, and none has less."""
    course = NOISE_COURSES[name]
    side = side_of(course.run(lambda scale: math.sqrt(exchange_rate * scale), min_steps=300))
    assert side.product == pytest.approx(course.gamma, rel=0.005)
    assert side.gamma == pytest.approx(course.gamma, rel=0.005)
    other = side_of(course.run(lambda scale: exchange_rate * scale, min_steps=300))
    assert other.product > side.product


def test_a_run_on_paper_finds_its_frontier():
    """S_min, E_min and γ of the damped quadratic come out of one adaptive run; the saving is the known 7.8 %."""
    problem = DampedQuadratic(damping=0.001)
    side = side_of(problem.run(lambda scale: math.sqrt(100 * scale)))
    assert side.min_steps == pytest.approx(problem.min_steps, rel=0.002)
    assert side.min_samples / side.min_steps == pytest.approx(problem.critical_batch_size, rel=0.002)
    assert side.product == pytest.approx(problem.gamma, rel=0.002)
    assert side.largest_saving == pytest.approx(0.078, rel=0.01)


@pytest.mark.parametrize("scales", [[], [1.0, math.nan], [1.0, 0.0], [-1.0]])
def test_a_noise_scale_that_is_none_is_refused(scales):
    """What is not resolved is left out by the caller, and not taken for a number."""
    with pytest.raises(ConfigError, match="positive"):
        adaptive_side(noise_scales=scales, global_batch_sizes=8.0)
