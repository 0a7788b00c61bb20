"""Learning-rate rules against their identities."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import RULES
from tests.control.known import AtLeast, Known, Unknown

batches = st.integers(1, 10**6)


def measured(phi):
    """A noise scale that is known exactly."""
    return Known(phi)


AT_LEAST, UNKNOWN = AtLeast(300.0, 2.0), Unknown()


def factor(rule, phi, *, batch, reference_batch=32):
    return RULES[rule](phi, batch=batch, reference_batch=reference_batch)


@given(batches, batches)
def test_plain_rules(batch, reference):
    """None, linear and square root are 1, s and √s in the ratio s of the batches, whatever is known."""
    s = batch / reference
    got = [factor(rule, UNKNOWN, batch=batch, reference_batch=reference) for rule in RULES]
    assert got[:3] == pytest.approx([1, s, math.sqrt(s)])


@pytest.mark.parametrize("rule", ["none", "linear", "square_root", "gain", "root_gain", "surge"])
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


@given(st.floats(1e-3, 1e6), batches, batches)
def test_root_gain_is_the_square_root_below_the_noise_scale_and_level_above(phi, batch, reference):
    """It lies between 1 and the square root, and comes to the ends where the noise scale does."""
    sizes = {"batch": batch, "reference_batch": reference}
    root, plain = factor("root_gain", measured(phi), **sizes), factor("square_root", measured(phi), **sizes)
    assert min(1, plain) * (1 - 1e-9) <= root <= max(1, plain) * (1 + 1e-9)
    assert factor("root_gain", measured(1e12), **sizes) == pytest.approx(plain, rel=1e-3)
    assert factor("root_gain", measured(1e-9), **sizes) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("rule", ["gain", "root_gain", "surge", "noise"])
@given(batch=batches, median=st.floats(1, 1e5), spread=st.floats(1.01, 5))
def test_the_factor_is_the_mean_over_what_is_known(rule, batch, median, spread):
    """The factor lies between those of the ends of the interval, and comes to that of the value as it narrows."""
    wide = Known(median, spread)
    ends = [factor(rule, measured(median * spread**k), batch=batch) for k in (-3, 3)]
    assert min(ends) * (1 - 1e-9) <= factor(rule, wide, batch=batch) <= max(ends) * (1 + 1e-9)
    narrow = factor(rule, Known(median, 1.001), batch=batch)
    assert narrow == pytest.approx(factor(rule, measured(median), batch=batch), rel=0.01)


@pytest.mark.parametrize("rule", ["gain", "root_gain"])
def test_the_factor_does_not_jump_where_the_ratio_is_resolved(rule):
    """As the upper end comes down from infinity past each of the ten values, no step of the factor is above 5 %."""
    known = [AtLeast(100.0, 1.5, open_from=open_from) for open_from in (0.01, 0.2, 0.5, 0.8, 1.2, 3.0)]
    factors = [factor(rule, phi, batch=64) for phi in [*known, Known(100.0, 1.5)]]
    assert all(abs(after / before - 1) < 0.05 for before, after in pairwise(factors))


def test_before_anything_is_known_the_factor_is_between_its_limits():
    """The gain at 4 times the reference lies half-way between 1 and 4."""
    assert factor("gain", UNKNOWN, batch=128) == pytest.approx(2.5)
    assert factor("root_gain", UNKNOWN, batch=128) == pytest.approx(1.5)
    assert factor("noise", UNKNOWN, batch=128) == pytest.approx(0.5)


@given(st.floats(1e-3, 1e6), batches, batches)
def test_surge_is_a_ratio_of_optimal_rates(phi, batch, reference):
    """The surge factor is the ratio of 2/(√(φ/B) + √(B/φ)) at the two batches."""
    optimal = [2 / (math.sqrt(phi / b) + math.sqrt(b / phi)) for b in (batch, reference)]
    known = measured(phi)
    assert factor("surge", known, batch=batch, reference_batch=reference) == pytest.approx(optimal[0] / optimal[1])


def test_surge_rises_to_the_noise_scale_and_falls_beyond():
    """Far below φ it is the square root, it is greatest at φ, and far above it falls as one over the square root."""
    known = measured(1024)
    assert factor("surge", measured(1e9), batch=128) == pytest.approx(2, rel=1e-6)
    factors = {batch: factor("surge", known, batch=batch) for batch in (256, 512, 1024, 2048, 4096)}
    assert max(factors, key=factors.get) == 1024
    assert factor("surge", measured(1e-3), batch=128) == pytest.approx(1 / 2, rel=1e-3)


@given(st.lists(st.tuples(batches, st.floats(1e-3, 1e6)), min_size=1, max_size=5), st.sampled_from(list(RULES)))
def test_nothing_compounds(path, rule):
    """However the batch came to be what it is, and through however many resumes, the rate follows from the present."""

    def present(batch, phi):
        return factor(rule, measured(phi), batch=batch)

    walked = [present(batch, phi) for batch, phi in path]
    batch, phi = path[-1]
    assert present(batch, phi) == walked[-1]
    # There and back: at the reference batch the base rate is left.
    if rule != "noise":
        assert present(32, phi) == pytest.approx(1)


def test_noise_rule():
    """The noise rule is 1/2 at B = φ."""
    assert factor("noise", measured(300), batch=300) == pytest.approx(0.5)
