"""Learning-rate rules against their identities, and the schedule against its closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import RULES, LearningRateSchedule
from dptrain.errors import ConfigError
from dptrain.noise import SmoothedMoments, noise_scale

batches = st.integers(1, 10**6)


def measured(phi, *, error=1e-9):
    """A noise scale near phi with the given relative error of both moments."""
    return noise_scale(
        SmoothedMoments(
            noise_trace=phi,
            grad_sq_norm=1.0,
            var_trace=(error * phi) ** 2,
            var_grad=error**2,
            cov=0.0,
            effective_steps=1000.0,
            degrees_of_freedom=1000.0,
            num_steps=1000,
            num_samples=1e5,
        )
    )


AT_LEAST = noise_scale(
    SmoothedMoments(
        noise_trace=300.0,
        grad_sq_norm=0.5,
        var_trace=1.0,
        var_grad=1.0,
        cov=0.0,
        effective_steps=1000.0,
        degrees_of_freedom=1000.0,
        num_steps=1000,
        num_samples=1e5,
    )
)
UNKNOWN = noise_scale(None)


def factor(rule, phi, *, batch, reference_batch=32):
    return RULES[rule](phi, batch=batch, reference_batch=reference_batch)


@given(batches, batches)
def test_plain_rules(batch, reference):
    """None, linear and square root are 1, s and √s in the ratio s of the batches, whatever is known."""
    s = batch / reference
    got = [factor(rule, UNKNOWN, batch=batch, reference_batch=reference) for rule in RULES]
    assert got[:3] == pytest.approx([1, s, math.sqrt(s)])


@pytest.mark.parametrize("rule", ["none", "linear", "square_root", "gain"])
@pytest.mark.parametrize("phi", [measured(300), AT_LEAST, UNKNOWN], ids=["resolved", "at least", "unknown"])
def test_reference_batch_keeps_the_rate(rule, phi):
    """At the reference batch every rule that knows one leaves the base rate alone."""
    assert factor(rule, phi, batch=32) == pytest.approx(1)


def test_gain_known_answer():
    """At φ = 300, B0 = 32, s = 8 AdaScale's gain is 4.776978."""
    assert factor("gain", measured(300), batch=256) == pytest.approx(4.776978, abs=1e-6)


@given(st.floats(1e-3, 1e6), batches, batches)
def test_gain_is_a_ratio_of_optimal_rates(phi, batch, reference):
    """The gain is ε_opt(B)/ε_opt(B0) of the noise rule, and lies between 1 and B/B0."""
    known, s = measured(phi), batch / reference
    gain = factor("gain", known, batch=batch, reference_batch=reference)
    assert gain == pytest.approx(factor("noise", known, batch=batch) / factor("noise", known, batch=reference))
    assert min(1, s) * (1 - 1e-12) <= gain <= max(1, s) * (1 + 1e-12)


@given(batches)
def test_gain_is_cautious_where_not_resolved(batch):
    """Where φ is not resolved, no φ within its interval has a smaller gain."""
    for phi in (AT_LEAST, UNKNOWN):
        assert phi.value is None
        cautious = factor("gain", phi, batch=batch)
        for possible in (phi.lower + 1e-9, phi.lower + 100, phi.lower + 1e6):
            assert cautious <= factor("gain", measured(possible), batch=batch) * (1 + 1e-6)
    assert factor("gain", UNKNOWN, batch=batch) == pytest.approx(min(1, batch / 32))


def test_noise_rule():
    """The noise rule is 1/2 at B = φ, uses the lower end where only that is known, and 1 where nothing is."""
    assert factor("noise", measured(300), batch=300) == pytest.approx(0.5)
    assert AT_LEAST.lower > 0
    assert factor("noise", AT_LEAST, batch=AT_LEAST.lower) == pytest.approx(0.5)
    assert factor("noise", UNKNOWN, batch=1) == 1


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
    ],
)
def test_schedule_settings_out_of_range(settings):
    """Settings that have no meaning together are refused."""
    with pytest.raises(ConfigError):
        LearningRateSchedule(**settings)
