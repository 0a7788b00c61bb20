"""Why there is no number: reasons with remedies, one warning, and metrics without what was not measured."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import dptrain
from dptrain.noise import Resolution, SmoothedMoments, noise_scale
from dptrain.observe.checks.reasons import DropLog, Reason, why_no_number


def loop(steps, *, accumulation=2, factor=1.0):
    """Train in one process; return (meter, warnings)."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dptrain.attach(model, every=1) as meter:
            for _ in range(steps):
                for _ in range(accumulation):
                    (model(torch.randn(3, 4)).square().mean() * factor).backward()
                meter.step()
                model.zero_grad()
            _ = meter.read()
    return meter, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"accumulation": 1}, Reason.ONE_SMALL_BATCH),
        ({"factor": float("nan")}, Reason.NOT_FINITE),
        ({"factor": 0.0}, Reason.ALL_ZERO),
    ],
)
def test_each_reason_is_reported_once_and_kept(settings, reason):
    """Four dropped steps are no news; the fifth brings one warning, and nine bring no second one."""
    meter, reported = loop(4, **settings)
    assert reported == []
    assert reason in meter.reason
    meter, reported = loop(9, **settings)
    assert len(reported) == 1
    assert reason in reported[0]
    assert f"9 of 9 dropped steps: {reason}" == meter.reason
    assert f"({meter.reason})" in str(meter.reading)
    assert meter.reading.as_metrics() == {}


def test_too_early_is_a_reason_too():
    """Before the first step, and after one, which has no interval."""
    meter, _ = loop(0)
    assert meter.reason == "too early: 0 steps measured"
    assert meter.reading.as_metrics() == {}
    meter, _ = loop(1)
    assert meter.reason == "too early: 1 steps measured"
    metrics = meter.reading.as_metrics()
    assert "noise_scale/trace" in metrics
    assert "noise_scale/lower" not in metrics


def test_drops_between_good_steps_are_no_news():
    """An overflow now and then stays without a warning, however often."""
    log = DropLog(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            log.dropped(Reason.NOT_FINITE)
            log.measured()
        for _ in range(20):
            log.dropped(Reason.RESTARTED)


def moments(trace, *, deviation):
    return SmoothedMoments(
        noise_trace=trace,
        grad_sq_norm=2.0,
        var_trace=deviation**2,
        var_grad=0.01,
        cov=0.0,
        effective_steps=50.0,
        degrees_of_freedom=60.0,
        num_steps=100,
        num_samples=800.0,
    )


def test_a_trace_far_below_zero_is_inconsistent():
    """At ten standard errors below zero, and at none of rounding's size; not at two, which chance gives."""
    far, near = noise_scale(moments(-10.0, deviation=1.0)), noise_scale(moments(-2.0, deviation=1.0))
    assert far.state is Resolution.INCONSISTENT
    assert (far.value, far.lower, str(far)) == (None, 0.0, "inconsistent")
    assert "below zero" in why_no_number(far, DropLog(None))
    assert near.state is Resolution.RESOLVED
    assert noise_scale(moments(-1.0, deviation=0.0)).state is Resolution.INCONSISTENT
    assert noise_scale(moments(-1e-9, deviation=0.0)).state is Resolution.RESOLVED
    assert noise_scale(moments(10.0, deviation=1.0)).state is Resolution.RESOLVED
