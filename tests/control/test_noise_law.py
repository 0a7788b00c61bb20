"""The noise laws: the projection onto the interval, and what it does in a closed loop with the real estimator."""

import math
from statistics import median
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import ExchangeRateLaw, Measurement, NoiseLaw
from dptrain.errors import ConfigError
from tests.control.closed_loop import arrival, closed_loop

LAWS = [NoiseLaw(), NoiseLaw(ratio=0.2), ExchangeRateLaw(samples_per_step=64)]
positive = st.floats(1e-6, 1e12)


def known(lower, upper):
    """A noise scale of which only the interval is known, at two standard errors."""
    contrast = lambda phi: 2.0 * ((phi < lower) - (phi > upper))  # noqa: E731 - an attribute of the fake
    return SimpleNamespace(bounds=lambda _z: (lower, upper), contrast=contrast)


def asked(law, phi, batch=64):
    measurement = Measurement(samples_seen=0, global_batch_size=batch, noise_scale=phi)
    return law.decide(measurement).global_batch_size


@pytest.mark.parametrize("law", LAWS, ids=repr)
@given(phi=positive, larger=positive)
def test_maps_rise_and_invert(law, phi, larger):
    """Each law's map from noise scale to batch rises, and the noise scale that a batch is right for inverts it."""
    assert law.noise_scale_for(law.batch_for(phi)) == pytest.approx(phi)
    if larger > phi:
        assert law.batch_for(larger) >= law.batch_for(phi)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@given(lower=positive, width=st.floats(1, 1e6), batch=st.integers(1, 10**6))
def test_projection(law, lower, width, batch):
    """With both ends known the law asks for the batch within them that is nearest to the present one."""
    ends = law.batch_for(lower), law.batch_for(lower * width)
    expected = max(min(max(batch, ends[0]), ends[1]), 1.0) if batch > ends[1] else max(batch, ends[0])
    assert asked(law, known(lower, lower * width), batch) == pytest.approx(expected)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_open_above_is_still_a_lower_bound(law):
    """An interval open above makes a batch below it grow, to the double at least, and moves no batch within it."""
    right = law.noise_scale_for(64)
    assert asked(law, known(right * 1.1, math.inf)) == 128
    assert asked(law, known(right * 100, math.inf)) == pytest.approx(law.batch_for(right * 100))
    assert asked(law, known(right * 0.9, math.inf)) == 64
    assert asked(law, known(math.inf, math.inf)) == 128


def test_contrast_decides_where_the_interval_lags():
    """Where the contrast says above but the lower end does not reach the batch yet, an open interval doubles it."""
    phi = SimpleNamespace(bounds=lambda _z: (10.0, math.inf), contrast=lambda _phi: 1.5)
    assert asked(NoiseLaw(), phi) == 128


@pytest.mark.parametrize("contrast", [0.9, -0.9, math.nan])
@pytest.mark.parametrize("interval", [(0.0, math.inf), (100.0, math.inf), (1.0, 2.0)])
def test_an_unsure_contrast_moves_nothing(contrast, interval):
    """Where the contrast at the present batch is within z of 0 the batch stays, whatever the interval."""
    phi = SimpleNamespace(bounds=lambda _z: interval, contrast=lambda _phi: contrast)
    assert asked(NoiseLaw(), phi) == 64


@pytest.mark.parametrize("contrast", [-9.0, 9.0])
@pytest.mark.parametrize("interval", [(math.nan, 3.0), (1.0, math.nan), (100.0, 2.0)])
def test_an_interval_out_of_order_moves_nothing(contrast, interval):
    """Ends that make no sense leave the batch alone, however sure the contrast looks."""
    phi = SimpleNamespace(bounds=lambda _z: interval, contrast=lambda _phi: contrast)
    assert asked(NoiseLaw(), phi) == 64


def test_a_batch_has_a_sample():
    """A noise scale of zero shrinks the batch to one sample, not to none."""
    assert asked(NoiseLaw(), known(0.0, 0.0)) == 1


def test_reason_has_the_numbers():
    """The reason tells what is known, what the present batch is right for, and what follows."""
    phi = SimpleNamespace(bounds=lambda _z: (310.0, 500.0), contrast={64.0: 2.1}.__getitem__)
    measurement = Measurement(samples_seen=0, global_batch_size=64, noise_scale=phi)
    reason = NoiseLaw().decide(measurement).reason
    assert reason == "noise scale is above 310, the batch of 64 is right for 64 (z = +2.1): grow to 310"


@pytest.mark.parametrize(
    "build",
    [
        lambda: NoiseLaw(z=0),
        lambda: NoiseLaw(z=math.nan),
        lambda: NoiseLaw(ratio=-1),
        lambda: ExchangeRateLaw(samples_per_step=0),
        lambda: ExchangeRateLaw(samples_per_step=math.inf),
    ],
)
def test_settings_out_of_range(build):
    """Settings that are not positive and finite are refused."""
    with pytest.raises(ConfigError):
        build()


@pytest.mark.parametrize(
    ("phi", "start", "samples_per_step", "right", "within"),
    [
        (1024, 16, 64, 256, 60),  # 16 times too small
        (16, 512, 64, 32, 60),  # 16 times too large
        (4096, 8, 1, 64, 120),  # 8 times too small, and the right batch itself is far below the noise scale
    ],
)
def test_finds_the_right_batch(phi, start, samples_per_step, right, within):
    """From far too small and far too large a batch, the median run reaches the right one in some tens of steps."""
    runs = [
        closed_loop(ExchangeRateLaw(samples_per_step=samples_per_step), phi_at=lambda _: phi, batch=start, seed=seed)
        for seed in range(9)
    ]
    assert median(arrival(run, right) for run in runs) <= within
    # 4 rungs off at the end would be a run that was lost; noise may leave it 1 or 2 beside the right one.
    assert all(right / 4 <= run[-1] <= right * 4 for run in runs)
    assert median(run[-1] for run in runs) == right


def test_stays_where_it_is_right():
    """At the right batch the noise of the measurement moves a run away for few of its steps, and none for good."""
    law = ExchangeRateLaw(samples_per_step=64)
    runs = [closed_loop(law, phi_at=lambda _: 1024, batch=256, seed=seed) for seed in range(9)]
    assert all(run[-1] == 256 for run in runs)
    assert sum(run.count(256) for run in runs) >= 0.97 * sum(map(len, runs))


def test_follows_up_and_down():
    """The batch follows a noise scale that rises a hundredfold, and one that falls again."""
    run = closed_loop(
        ExchangeRateLaw(samples_per_step=64),
        phi_at=lambda step: 40 * 100 ** (step / 300 if step < 300 else 2 - step / 300),
        batch=64,
        seed=0,
    )
    assert max(run) >= 256
    assert run[-1] <= max(run) / 2
