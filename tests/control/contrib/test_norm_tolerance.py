"""The norm test as a law: its known answer, and that it is the noise law in other terms."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import Measurement, NoiseLaw, NormTestLaw
from dptrain.errors import ConfigError

positive = st.floats(1e-3, 1e6)


def measured(lower, upper, *, batch=64):
    contrast = lambda phi: 2.0 * ((phi < lower) - (phi > upper))  # noqa: E731 - an attribute of the fake
    phi = SimpleNamespace(bounds=lambda _z: (lower, upper), contrast=contrast)
    return Measurement(samples_seen=0, global_batch_size=batch, noise_scale=phi)


def test_known_answer():
    """With φ = 100 and η = 1/2 the smallest batch whose noise is within the tolerance is 400."""
    assert NormTestLaw(tolerance=0.5).decide(measured(100, 100)).global_batch_size == 400


@given(phi=positive, tolerance=st.floats(0.05, 5))
def test_the_batch_just_passes(phi, tolerance):
    """At the batch asked for, noise over signal φ/B is the square of the tolerance."""
    law = NormTestLaw(tolerance=tolerance)
    assert math.sqrt(phi / law.batch_for(phi)) == pytest.approx(tolerance)
    assert law.noise_scale_for(law.batch_for(phi)) == pytest.approx(phi)


@given(lower=positive, width=st.floats(1, 100), tolerance=st.floats(0.05, 5), batch=st.integers(1, 10**5))
def test_it_is_the_noise_law(lower, width, tolerance, batch):
    """From any batch and interval it decides as the noise law with ratio 1/η²."""
    here = measured(lower, lower * width, batch=batch)
    other = NoiseLaw(ratio=tolerance**-2).decide(here).global_batch_size
    assert NormTestLaw(tolerance=tolerance).decide(here).global_batch_size == pytest.approx(other)


@pytest.mark.parametrize("tolerance", [0, -1, math.nan, math.inf])
def test_tolerance_out_of_range(tolerance):
    """A tolerance that no gradient meets, or every one, is refused."""
    with pytest.raises(ConfigError):
        NormTestLaw(tolerance=tolerance)
