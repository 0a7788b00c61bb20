"""Steps that are known on paper: sums of whole steps against their closed forms and against the listed figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.frontier.curves import NOISE_COURSES, DampedQuadratic, noisy_quadratic_steps

LISTED = {1: 462268, 256: 2105, 4096: 777, 2**20: 672}


@pytest.mark.parametrize("batch", [1.0, 100.0, 10_000.0])
def test_the_damped_rate_has_a_hyperbola(batch):
    """As a → 0 the steps of a fixed batch are S_min(1 + B_crit/B), B_crit = 107.488."""
    problem = DampedQuadratic(damping=0.002)
    assert problem.critical_batch_size == pytest.approx(107.488, rel=1e-5)
    found = problem.run(lambda _: batch).num_steps
    assert found == pytest.approx(problem.min_steps * (1 + problem.critical_batch_size / batch), rel=2.5e-3)


def test_the_greedy_rate_has_none():
    """At a = 1 the samples are the same at every batch, as 1/u grows by B/K a step."""
    problem = DampedQuadratic(damping=1.0)
    samples = [batch * problem.run(lambda _, batch=batch: batch).num_steps for batch in (0.25, 1.0, 4.0)]
    assert samples == pytest.approx([5 * 99] * 3, rel=0.01)
    assert problem.min_steps == 0


@pytest.mark.parametrize("name", NOISE_COURSES)
def test_a_course_has_the_mean_and_the_gamma_that_it_says(name):
    """Both are integrals over the way; and γ is at most 1, by the inequality of Cauchy and Schwarz."""
    course = NOISE_COURSES[name]
    scales = np.array([course.noise_scale(x) for x in (np.arange(20_000) + 0.5) / 20_000])
    assert scales.mean() == pytest.approx(course.mean, rel=1e-6)
    assert np.sqrt(scales).mean() ** 2 / scales.mean() == pytest.approx(course.gamma, rel=1e-5)
    assert course.gamma <= 1


@pytest.mark.parametrize("name", NOISE_COURSES)
def test_a_course_is_taken_in_the_steps_of_its_hyperbola(name):
    """At a fixed batch they are S_min(1 + mean/B), with B_crit the mean of the noise scale over the way."""
    course = NOISE_COURSES[name]
    for batch in (0.1, 1.0, 10.0):
        found = course.run(lambda _, batch=batch: batch, min_steps=200).num_steps
        assert found == pytest.approx(200 * (1 + course.mean / batch), rel=1e-4)


def test_a_run_tells_each_of_its_steps():
    """There are as many noise scales and batches as steps begun, and the noise scale of a falling loss grows."""
    run = DampedQuadratic(damping=0.05).run(lambda scale: math.sqrt(10 * scale))
    assert len(run.noise_scales) == len(run.batch_sizes) == math.ceil(run.num_steps)
    assert run.batch_sizes == pytest.approx(np.sqrt(10 * run.noise_scales))
    assert (np.diff(run.noise_scales) > 0).all()


@pytest.mark.parametrize("batch", LISTED)
def test_the_noisy_quadratic_has_the_listed_steps(batch):
    """Within the half per cent by which a grid of learning rates misses the best one."""
    assert noisy_quadratic_steps(batch) == pytest.approx(LISTED[batch], rel=5e-3)
    assert noisy_quadratic_steps(batch) <= LISTED[batch]
