"""The warning of a learning rate that is too high for the batch: where it is due, and where it is not."""

import math

import numpy as np
import pytest

from dptrain.train.hooks.rate_check import RateCheck
from tests.control.known import Known, Unknown


def _bounce(rate, *, steps=400, batch=16, dimensions=50):
    """SGD in a bowl of curvature 1 with noise: (true noise scale over the last steps, loss of each step)."""
    rng = np.random.default_rng(0)
    theta, losses = np.full(dimensions, 3.0), []
    for _ in range(steps):
        losses.append(float(theta @ theta) / 2)
        theta = theta - rate * (theta + rng.normal(size=dimensions) / math.sqrt(batch))
    squares = [2 * loss for loss in losses[-steps // 2 :]]
    return dimensions / (sum(squares) / len(squares)), losses


@pytest.mark.parametrize(("rate", "warns"), [(1.7, True), (0.1, False)])
def test_a_rate_near_divergence_is_warned_of_and_an_arrival_is_not(rate, warns):
    """Both losses stop falling; at 1.7 times the inverse curvature φ is below the batch, at a tenth far above."""
    phi, losses = _bounce(rate)
    check, said, mean = RateCheck(patience_samples=1600), [], losses[0]
    for step, loss in enumerate(losses, start=1):
        mean = 0.9 * mean + 0.1 * loss
        check, warning = check.after(Known(phi, 1.05), batch=16, samples_seen=16 * step, loss=mean)
        said += [warning] if warning else []
    assert (phi < 16) == warns
    assert len(said) == warns
    assert all(
        text.startswith("learning rate may be too high for this batch size: noise scale at most") for text in said
    )


def test_no_warning_while_the_loss_falls_or_nothing_is_known():
    """A small noise scale alone is no reason, and neither is a loss that stands still at an unknown one."""
    falling = still = RateCheck(patience_samples=100)
    for step in range(1, 100):
        falling, first = falling.after(Known(1.0), batch=64, samples_seen=64 * step, loss=1.0 / step)
        still, second = still.after(Unknown(), batch=64, samples_seen=64 * step, loss=1.0)
        assert first is second is None
    assert falling.after(Known(1.0), batch=64, samples_seen=6400, loss=None)[1] is None
