"""The plain function on squared norms."""

import numpy as np
import pytest

import dptrain
from dptrain.errors import ConfigError


def draws(*, steps, sizes, weights, seed=0, dimensions=50, grad_sq_norm=4.0, trace=200.0):
    """Squared norms of Gaussian gradients whose |G|² and tr(Σ) are known."""
    rng = np.random.default_rng(seed)
    mean = np.full(dimensions, (grad_sq_norm / dimensions) ** 0.5)
    scale = (trace / dimensions) ** 0.5
    small, large = [], []
    for _ in range(steps):
        gradients = [mean + scale * rng.standard_normal(dimensions) / size**0.5 for size in sizes]
        small.append([float(g @ g) for g in gradients])
        combined = sum(w * g for w, g in zip(weights, gradients, strict=True))
        large.append(float(combined @ combined))
    return small, large


@pytest.mark.parametrize(
    ("sizes", "weights"), [([8.0] * 4, [0.25] * 4), ([4.0, 12.0, 32.0], [0.25, 0.25, 0.5]), ([4.0, 12.0], [0.25, 0.75])]
)
def test_a_known_noise_scale_lies_in_the_interval(sizes, weights):
    """For equal and unequal sizes and weights, tr(Σ)/|G|² = 50 is inside the 95 % interval in most of forty tries."""
    inside = 0
    for seed in range(40):
        small, large = draws(steps=300, sizes=sizes, weights=weights, seed=seed)
        found = dptrain.noise_scale(small, large, sizes=sizes, weights=weights)
        inside += found.lower <= 50 <= found.upper
    assert inside >= 33  # 38 expected; fewer than 34 has a probability of 0.3 %


def test_one_size_for_all_and_arrays_are_taken():
    """A number of samples stands for each small batch; NumPy arrays are as good as lists."""
    small, large = draws(steps=50, sizes=[8.0, 8.0], weights=[0.5, 0.5])
    whole = dptrain.noise_scale(np.array(small), np.array(large), sizes=8)
    assert whole == dptrain.noise_scale(small, large, sizes=[8, 8], weights=[0.5, 0.5])


@pytest.mark.parametrize(
    ("small", "large", "options", "message"),
    [
        ([[1.0, 2.0]], [1.0, 2.0], {"sizes": 8}, "1 steps"),
        ([[1.0]], [1.0], {"sizes": 8}, "two small batches"),
        ([], [], {"sizes": 8}, "at least one step"),
        ([[1.0, 2.0], [1.0]], [1.0, 1.0], {"sizes": 8}, "each step needs 2"),
        ([[1.0, 2.0]], [1.0], {"sizes": [8, 0]}, "positive"),
        ([[1.0, 2.0]], [1.0], {"sizes": 8, "weights": [1.0, 1.0]}, "add up to one"),
    ],
)
def test_what_cannot_be_right_is_refused(small, large, options, message):
    """Lengths, sizes and weights are checked before anything is estimated."""
    with pytest.raises(ConfigError, match=message):
        dptrain.noise_scale(small, large, **options)
