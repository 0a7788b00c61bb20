"""Proves that one step's estimates are unbiased, signed and as scattered as the theory says, on known problems."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.noise import SquaredNorms, unbiased_moments


def pair(norms, **kwargs):
    moments = unbiased_moments(norms, **kwargs)
    return moments.noise_trace, moments.grad_sq_norm


def equal_batches(small, *, b, large):
    """The norms of K equal batches of b samples each."""
    return SquaredNorms.of(small, sizes=[b] * len(small), large_sq_norm=large)


def gaussian_pairs(rng, *, G, sigma, sizes, weights=None, num_steps):
    """Estimates of many steps whose per-sample gradients are normal with mean G and covariance diag(sigma²)."""
    weights = np.asarray(sizes) / sum(sizes) if weights is None else np.asarray(weights)
    noise = rng.standard_normal((num_steps, len(sizes), len(G))) * sigma / np.sqrt(sizes)[:, None]
    g = G + noise
    large = ((g * weights[:, None]).sum(axis=1) ** 2).sum(axis=1)
    small = (g**2).sum(axis=2)
    return np.array(
        [
            pair(SquaredNorms.of(list(s), sizes=sizes, weights=list(weights), large_sq_norm=n))
            for s, n in zip(small, large, strict=True)
        ]
    )


def test_the_coin():
    """Two replicas that draw 1 or 3: over the four cases tr(Σ) averages to 1, |G|² to 4, and the ratio to 1/3."""
    cases = [
        pair(equal_batches([x * x, y * y], b=1, large=((x + y) / 2) ** 2))
        for x, y in itertools.product((1, 3), repeat=2)
    ]
    traces, grads = zip(*cases, strict=True)
    assert sum(traces) / 4 == 1
    assert sum(grads) / 4 == 4
    assert sum(s / g for s, g in cases) / 4 == pytest.approx(1 / 3)


def test_the_coin_seen_by_one_rank_would_be_wrong():
    """With the small norm of one rank alone the two means stay right, but the mean ratio of the coin is −19/7."""
    cases = [
        pair(equal_batches([x * x] * 2, b=1, large=((x + y) / 2) ** 2)) for x, y in itertools.product((1, 3), (1, 3))
    ]
    assert sum(s for s, _ in cases) / 4 == 1
    assert sum(s / g for s, g in cases) / 4 == pytest.approx(-19 / 7)


@given(
    small=st.lists(st.floats(0, 1e3), min_size=2, max_size=8),
    b=st.integers(1, 1000),
    large=st.floats(0, 1e3),
)
@settings(derandomize=True)
def test_equal_sizes_give_the_textbook_estimator(small, b, large):
    """F3 reduces to F2: (B·nb − b·ns)/(B − b) and (ns − nb)/(1/b − 1/B)."""
    B, ns = b * len(small), sum(small) / len(small)
    trace, grad = pair(equal_batches(small, b=b, large=large))
    assert trace == pytest.approx((ns - large) / (1 / b - 1 / B), rel=1e-9, abs=1e-6)
    assert grad == pytest.approx((B * large - b * ns) / (B - b), rel=1e-9, abs=1e-9)


@given(
    shards=st.lists(st.tuples(st.integers(1, 500), st.floats(0.1, 1)), min_size=2, max_size=6),
    trace=st.floats(0, 1e4),
    grad=st.floats(0, 1e4),
)
@settings(derandomize=True)
def test_expected_norms_give_back_the_truth_for_any_sizes_and_weights(shards, trace, grad):
    """|G|² + c1·tr(Σ) and |G|² + c2·tr(Σ) are inverted exactly, whatever the sizes and the weights."""
    sizes = [b for b, _ in shards]
    weights = [w / sum(w for _, w in shards) for _, w in shards]
    c1 = sum(w / b for w, b in zip(weights, sizes, strict=True))
    c2 = sum(w * w / b for w, b in zip(weights, sizes, strict=True))
    small = [grad + trace / b for b in sizes]
    norms = SquaredNorms.of(small, sizes=sizes, weights=weights, large_sq_norm=grad + c2 * trace)
    rounding = 1e-12 * (grad + trace + 1e-290) / (c1 - c2)
    assert pair(norms) == (pytest.approx(trace, abs=rounding), pytest.approx(grad, abs=rounding))


@pytest.mark.parametrize("weights", [None, [1 / 3, 1 / 3, 1 / 3]], ids=["by samples", "equal weights"])
def test_uneven_shards_are_unbiased(weights):
    """Shards of 4, 12 and 32 samples of a problem with tr(Σ) = 200 and |G|² = 8 give both within 2 %."""
    d = 50
    pairs = gaussian_pairs(
        np.random.default_rng(4),
        G=np.full(d, math.sqrt(8 / d)),
        sigma=np.full(d, 2.0),
        sizes=[4, 12, 32],
        weights=weights,
        num_steps=8000,
    )
    assert pairs.mean(axis=0) == pytest.approx([200, 8], rel=0.02)


def test_sizes_that_are_taken_for_equal_are_wrong_by_far():
    """The equal-size formula on the shards 4/12/32 says 484 where 200 is true: sizes travel with their norms."""
    trace, grad, sizes = 200, 8, [4, 12, 32]
    blind = equal_batches([grad + trace / b for b in sizes], b=16, large=grad + trace / 48)
    assert pair(blind)[0] == pytest.approx(484, abs=1)


def test_the_scatter_is_the_one_of_theory():
    """d=20, K=4, b=2, σ=1.5, |G|²=1.8: Var tr(Σ) = 67.5, Var |G|² = 6.24375, Cov = −8.4375 (F4)."""
    pairs = gaussian_pairs(
        np.random.default_rng(8), G=np.full(20, 0.3), sigma=np.full(20, 1.5), sizes=[2] * 4, num_steps=20_000
    )
    assert pairs.mean(axis=0) == pytest.approx([45, 1.8], rel=0.02)
    assert np.cov(pairs.T) == pytest.approx(np.array([[67.5, -8.4375], [-8.4375, 6.24375]]), rel=0.04)


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 2)])
def test_draws_without_replacement_from_a_small_data_set(sizes):
    """Over every way to draw 4 of 6 samples, the corrected means are exactly |G|² and tr(Σ) of the 6 samples."""
    data = np.array([[1.0, 0.0], [2.0, -1.0], [0.5, 3.0], [-1.0, 1.0], [4.0, 2.0], [0.0, 0.5]])
    G, S = data.mean(axis=0), data.var(axis=0, ddof=1).sum()
    ends = np.cumsum(sizes)
    found = []
    for order in itertools.permutations(range(6), 4):
        shards = [data[list(order[end - b : end])].mean(axis=0) for b, end in zip(sizes, ends, strict=True)]
        large = data[list(order)].mean(axis=0)
        norms = SquaredNorms.of([float(g @ g) for g in shards], sizes=sizes, large_sq_norm=float(large @ large))
        found.append((*pair(norms, population=6), pair(norms)[1]))
    trace, grad, uncorrected = np.mean(found, axis=0)
    assert trace == pytest.approx(S)
    assert grad == pytest.approx(G @ G)
    assert uncorrected == pytest.approx(G @ G - S / 6)


def test_signed_means_are_right_where_clamping_and_mean_ratios_are_wrong():
    """Where a quarter of the steps have a negative |G|², the ratio of signed means is right; the shortcuts are not."""
    truth, d = 25.0, 40
    G, sigma = np.full(d, math.sqrt(1 / d)), np.full(d, math.sqrt(truth / d))
    pairs = gaussian_pairs(np.random.default_rng(9), G=G, sigma=sigma, sizes=[3, 3], num_steps=20_000)
    traces, grads = pairs.T
    assert 0.2 < (grads < 0).mean() < 0.3
    assert traces.mean() / grads.mean() == pytest.approx(truth, rel=0.03)
    assert traces.mean() / grads.clip(0).mean() < 0.9 * truth
    assert abs((traces / grads).mean() / truth - 1) > 0.1


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)


@given(
    small=NUMBERS,
    large=NUMBERS,
    inverse_small=NUMBERS,
    inverse_large=NUMBERS,
    num_small=st.integers(0, 5),
    num_samples=NUMBERS,
    population=st.none() | st.integers(1, 10**6),
)
@settings(derandomize=True)
def test_any_numbers_give_finite_estimates_or_none(population, num_small, **numbers):
    """Nothing raises, and nothing that is not finite gets through."""
    moments = unbiased_moments(SquaredNorms(num_small=num_small, **numbers), population=population)
    if moments is not None:
        assert num_small >= 2
        assert moments.num_samples > 0
        assert all(math.isfinite(v) for v in (moments.noise_trace, moments.grad_sq_norm, moments.num_samples))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_says_nothing(bad):
    """A NaN or infinite norm, in a small batch or in the large one, gives None."""
    assert unbiased_moments(equal_batches([1.0, bad], b=4, large=1.0)) is None
    assert unbiased_moments(equal_batches([1.0, 2.0], b=4, large=bad)) is None


def test_one_small_batch_says_nothing():
    """One batch cannot tell noise from signal: None, not a division of rounding errors."""
    assert unbiased_moments(SquaredNorms.of([3.0], sizes=[7], large_sq_norm=3.0, weights=[1 + 1e-15])) is None


@given(exponent=st.integers(-30, 30), small=st.floats(0.1, 10), large=st.floats(0.1, 10))
@settings(derandomize=True)
def test_scaled_gradients_scale_both_estimates(exponent, small, large):
    """Gradients times 2^e: both estimates times 4^e exactly."""
    scale = 4.0**exponent
    trace, grad = pair(equal_batches([small, 2 * small], b=3, large=large))
    scaled = pair(equal_batches([scale * small, scale * 2 * small], b=3, large=scale * large))
    assert scaled == (scale * trace, scale * grad)
