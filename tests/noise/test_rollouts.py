"""The two parts of a policy gradient's noise against a bandit whose moments are enumerated."""

from __future__ import annotations

import numpy as np
import pytest

from dptrain.errors import ConfigError
from dptrain.noise import SquaredNorms, unbiased_moments
from dptrain.noise.rollouts import PromptNorms, rollout_moments

REWARDS = np.array([[1.9, 0.2, -1.5], [0.8, 0.9, -0.7], [1.6, -0.4, 0.1], [0.7, 0.1, -0.5]])
"""Of three actions under four prompts."""
LOGITS = np.array([[0.3, 0.0, -0.2], [0.1, 0.4, 0.0], [0.0, 0.0, 0.5], [-0.3, 0.2, 0.1]])
UNEVEN = (2, 5, 9, 3, 12) * 4
"""Rollouts of twenty prompts."""


def policies():
    odds = np.exp(LOGITS)
    return odds / odds.sum(1, keepdims=True)


def score_gradients():
    """Gradients (prompt, action, parameter) of reward·log π, for logits = own + shared: three shared parameters."""
    return REWARDS[:, :, None] * (np.eye(3)[None] - policies()[:, None, :])


def enumerated():
    """Return (within, between, |G|²) of the bandit in closed form."""
    chance, gradients = policies(), score_gradients()
    means = (chance[:, :, None] * gradients).sum(1)
    within = (chance * ((gradients - means[:, None]) ** 2).sum(2)).sum(1).mean()
    centre = means.mean(0)
    return within, ((means - centre) ** 2).sum(1).mean(), centre @ centre


def simulated(generator, *, sizes, weights):
    """One step: a prompt for each size, with so many rollouts in two uneven parts."""
    chance, gradients = policies(), score_gradients()
    limits, prompts, means = chance.cumsum(1)[:, :-1], [], []
    for size, weight in zip(sizes, weights, strict=True):
        prompt = generator.integers(len(chance))
        found = gradients[prompt][limits[prompt].searchsorted(generator.random(size))]
        parts = [found[: size // 3 + 1], found[size // 3 + 1 :]]
        prompts.append(
            PromptNorms(
                part_sq_norms=[float((part.mean(0) ** 2).sum()) for part in parts],
                part_sizes=[len(part) for part in parts],
                sq_norm=float((found.mean(0) ** 2).sum()),
                weight=weight,
            )
        )
        means.append(found.mean(0))
    whole = np.average(means, axis=0, weights=weights)
    return prompts, float(whole @ whole)


@pytest.mark.parametrize(
    ("sizes", "weights", "num_steps", "tolerance"),
    [((4,) * 16, (1,) * 16, 1_500, 0.04), (UNEVEN, (1,) * 20, 1_500, 0.04), (UNEVEN, UNEVEN, 6_000, 0.02)],
)
def test_both_parts_are_those_of_the_bandit(sizes, weights, num_steps, tolerance):
    """Equal, unequal and rollout-weighted prompts: within, between and |G|², the last, hardest case to 2 %."""
    generator = np.random.default_rng(0)
    found = np.zeros(3)
    for _ in range(num_steps):
        prompts, large = simulated(generator, sizes=sizes, weights=weights)
        moments = rollout_moments(prompts, large_sq_norm=large)
        found += np.array([moments.within, moments.between, moments.grad_sq_norm]) / num_steps
    assert found == pytest.approx(enumerated(), rel=tolerance)


def test_the_parts_add_up_to_the_noise_of_prompts():
    """Between plus within/n is, step by step, what the plain estimator says where a sample is a prompt."""
    prompts, large = simulated(np.random.default_rng(1), sizes=(6, 6, 6), weights=(1, 1, 1))
    moments = rollout_moments(prompts, large_sq_norm=large)
    norms = SquaredNorms.of([p.sq_norm for p in prompts], sizes=[1, 1, 1], large_sq_norm=large)
    plain = unbiased_moments(norms)
    assert moments.prompt_trace(6) == pytest.approx(plain.noise_trace)
    assert moments.grad_sq_norm == pytest.approx(plain.grad_sq_norm)


def test_one_prompt_or_one_part_is_refused():
    """Nothing can be told between prompts from one of them, nor within one from a single part."""
    prompts, large = simulated(np.random.default_rng(1), sizes=(6, 6), weights=(1, 1))
    with pytest.raises(ConfigError, match="two prompts"):
        rollout_moments(prompts[:1], large_sq_norm=large)
    whole = PromptNorms(part_sq_norms=[1.0], part_sizes=[6], sq_norm=1.0)
    with pytest.raises(ConfigError, match="two parts"):
        rollout_moments([whole, prompts[0]], large_sq_norm=large)
