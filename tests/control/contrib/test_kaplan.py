"""Kaplan's critical batch: its known answer, its slope, and its silence where there is no loss."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import Measurement
from dptrain.control.contrib.kaplan import KaplanLaw, critical_batch_tokens
from dptrain.errors import ConfigError


def asked(loss, *, tokens_per_sample=1024, ratio=1.0):
    measurement = Measurement(samples_seen=0, global_batch_size=64, noise_scale=None, loss=loss)
    return KaplanLaw(tokens_per_sample=tokens_per_sample, ratio=ratio).decide(measurement).global_batch_size


def test_known_answer():
    """At 1 nat per token it is 2e8 tokens; at 2 nats 7.4 million, a batch of 7,209 sequences of 1024."""
    assert critical_batch_tokens(1.0) == 2e8
    assert critical_batch_tokens(2.0) == pytest.approx(7.382e6, rel=1e-3)
    assert asked(2.0) == pytest.approx(7209, rel=1e-3)


@given(st.floats(0.5, 10), st.integers(1, 10**4), st.floats(0.1, 10))
def test_it_rises_as_the_loss_falls(loss, tokens_per_sample, ratio):
    """A loss a tenth lower has a critical batch 1.65 times larger, whatever the sequences and the ratio."""
    before, after = (asked(x, tokens_per_sample=tokens_per_sample, ratio=ratio) for x in (loss, 0.9 * loss))
    assert after >= before >= 1
    if before > 1:
        assert after / before == pytest.approx(0.9**-4.76)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, 0.0, -1.0, 1e-5, 1e5])
def test_no_loss_moves_nothing(loss):
    """Where no loss is known, or it is none in nats per token, the batch stays."""
    assert asked(loss) == 64


@pytest.mark.parametrize("settings", [{"tokens_per_sample": 0}, {"tokens_per_sample": 8, "ratio": 0.0}])
def test_settings_out_of_range(settings):
    """Sequences without tokens and a ratio of nothing are refused."""
    with pytest.raises(ConfigError):
        KaplanLaw(**settings)
