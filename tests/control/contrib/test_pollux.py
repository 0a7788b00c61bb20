"""Pollux' goodput: equal to ours without overlap, different with it in the direction that its model says."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.control import GoodputLaw, Measurement, PolluxLaw, StepTimeModel
from dptrain.errors import ConfigError

times = st.floats(1e-3, 1e1)


def model(per_step, per_pass, per_sample, *, full_at=0.0):
    return StepTimeModel(
        per_step_s=per_step,
        per_pass_s=per_pass,
        per_sample_s=per_sample,
        full_at_samples=full_at,
        world_size=2,
        is_split_known=True,
        error=0.0,
    )


def asked(law, phi, *, batch, step_time):
    contrast = lambda right: 2.0 * ((right < phi) - (right > phi))  # noqa: E731 - an attribute of the fake
    known = SimpleNamespace(bounds=lambda _z: (phi, phi), contrast=contrast)
    measurement = Measurement(samples_seen=0, global_batch_size=batch, noise_scale=known, step_time=step_time)
    return law.decide(measurement).global_batch_size


@settings(deadline=None)
@given(times, times, times, st.floats(1, 1e5), st.integers(2, 10**4))
def test_without_overlap_it_is_the_goodput_law(per_step, per_pass, per_sample, phi, batch):
    """With γ = 1 it asks for the same batch."""
    step_time = model(per_step, per_pass, per_sample)
    ours, pollux = GoodputLaw(largest_micro_batch_size=64), PolluxLaw(largest_micro_batch_size=64, overlap=1.0)
    expected = asked(ours, phi, batch=batch, step_time=step_time)
    assert asked(pollux, phi, batch=batch, step_time=step_time) == pytest.approx(expected, rel=1e-4)


@settings(deadline=None)
@given(times, times, times, st.floats(1, 10), st.integers(2, 2000))
def test_its_time_is_right_at_the_present_batch(per_step, per_pass, per_sample, overlap, batch):
    """Whatever the overlap, the present batch takes the time that the fit says, in units of one of its passes."""
    law, step_time = PolluxLaw(largest_micro_batch_size=64, overlap=overlap), model(per_step, per_pass, per_sample)
    shape = law.layout(step_time, batch)
    expected = step_time.step_s(**shape) / step_time.pass_s(shape["micro_batch_size"])
    assert law.step_time(step_time, present=batch)(batch) == pytest.approx(expected)


def test_known_answer():
    """With T_grad = 3, T_sync = 4 and γ = 2 one pass takes 5, and each further pass 3 more."""
    law, step_time = PolluxLaw(largest_micro_batch_size=3, overlap=2.0), model(2.0, 0.0, 1.0)
    seconds = law.step_time(step_time, present=6)
    assert [3 * seconds(batch) for batch in (6, 12, 24)] == pytest.approx([5.0, 8.0, 14.0])


def test_a_hidden_synchronisation_is_not_worth_a_larger_batch():
    """Where the pass is long enough to hide the synchronisation, more overlap asks for a smaller batch."""
    step_time = model(0.5, 0.0, 1.0)
    batches = [
        asked(PolluxLaw(largest_micro_batch_size=1024, overlap=overlap), 400, batch=8, step_time=step_time)
        for overlap in (1.0, 2.0, 10.0)
    ]
    assert batches == sorted(batches, reverse=True)
    assert batches[-1] < batches[0]


@settings(deadline=None)
@given(times, times, times, st.floats(0, 100), st.floats(1, 10), st.floats(1e-2, 1e6), st.floats(1e-2, 1e6))
def test_the_batch_rises_with_the_noise_scale(per_step, per_pass, per_sample, knee, overlap, phi, larger):
    """For any times and overlap, from the same batch, more noise never asks for less."""
    law, step_time = (
        PolluxLaw(largest_micro_batch_size=64, overlap=overlap),
        model(per_step, per_pass, per_sample, full_at=knee),
    )
    smaller, greater = sorted((phi, larger))
    batches = [asked(law, noise, batch=64, step_time=step_time) for noise in (smaller, greater)]
    assert batches[0] <= batches[1] * (1 + 1e-6)


def test_a_step_that_takes_no_time_in_its_passes():
    """Where the fit leaves nothing to the passes, larger batches are free."""
    assert asked(PolluxLaw(largest_micro_batch_size=64), 10, batch=8, step_time=model(1.0, 0.0, 0.0)) >= 16


@pytest.mark.parametrize("overlap", [0.9, 11, float("nan")])
def test_overlap_out_of_range(overlap):
    """An overlap outside of Pollux' range is refused."""
    with pytest.raises(ConfigError):
        PolluxLaw(largest_micro_batch_size=8, overlap=overlap)
