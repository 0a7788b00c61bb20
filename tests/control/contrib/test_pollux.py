"""Pollux' goodput: equal to ours without overlap, different with it in the direction that its model says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import BatchSizeGrid, Measurement, OnGrid, StepTimeModel
from dptrain.control.contrib.pollux import PolluxLaw
from dptrain.control.goodput import GoodputLaw
from dptrain.errors import ConfigError
from tests.control.known import Known

times = st.floats(1e-3, 1e1)


def model(per_step, per_micro_batch, per_sample, *, full_at=0.0):
    return StepTimeModel(
        per_step_s=per_step,
        per_micro_batch_s=per_micro_batch,
        per_sample_s=per_sample,
        covariance=((0.0, 0.0, 0.0),) * 3,
        full_at_samples=full_at,
        world_size=2,
        timed_batches=tuple(1 << k for k in range(20)),
        recent_batches=tuple(1 << k for k in range(20)),
        error=0.0,
    )


def measured(phi, *, batch, step_time):
    return Measurement(samples_seen=0, global_batch_size=batch, noise_scale=Known(phi), step_time=step_time)


def asked(law, phi, *, batch, step_time):
    control = OnGrid(law, BatchSizeGrid(quantum=2, largest=1 << 19))
    return control.update(control.init(), measured(phi, batch=batch, step_time=step_time))[1].global_batch_size


@given(times, times, times, st.integers(1, 12), st.integers(1, 12))
def test_without_overlap_it_is_the_goodput_law(per_step, per_micro_batch, per_sample, present, other):
    """With γ = 1 a batch costs what it costs the goodput law."""
    measurement = measured(100.0, batch=1 << present, step_time=model(per_step, per_micro_batch, per_sample))
    ours, pollux = GoodputLaw(largest_micro_batch_size=64), PolluxLaw(largest_micro_batch_size=64, overlap=1.0)
    expected = ours.log_cost(1 << present, 1 << other, measurement)
    assert pollux.log_cost(1 << present, 1 << other, measurement) == pytest.approx(expected, abs=1e-9)


def test_known_answer():
    """With T_grad = 3, T_sync = 4 and γ = 2 one micro-batch takes 5, and each further one 3 more."""
    law, measurement = PolluxLaw(largest_micro_batch_size=3), measured(100.0, batch=6, step_time=model(2.0, 0.0, 1.0))
    costs = [law.log_cost(6, other, measurement)[0] for other in (6, 12, 24)]
    assert costs == pytest.approx([0.0, math.log(8 / 5), math.log(14 / 5)])


def test_a_hidden_synchronisation_makes_small_batches_dear():
    """The more of the synchronisation a micro-batch hides, the less time half of the batch saves."""
    measurement = measured(100.0, batch=8, step_time=model(0.5, 0.0, 1.0))
    costs = [
        PolluxLaw(largest_micro_batch_size=1024, overlap=overlap).log_cost(8, 4, measurement)[0]
        for overlap in (1.0, 2.0, 10.0)
    ]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(math.log(2.5 / 4.5))


def test_it_decides_like_any_law():
    """Behind the grid it grows where the noise scale is far above the batch, and stays where nothing is gained."""
    step_time = model(2.0, 0.0, 1.0)
    assert asked(PolluxLaw(largest_micro_batch_size=64), 1e6, batch=8, step_time=step_time) == 16
    assert asked(PolluxLaw(largest_micro_batch_size=64), 1.0, batch=8, step_time=step_time) < 8


@pytest.mark.parametrize("overlap", [0.9, 11, float("nan")])
def test_overlap_out_of_range(overlap):
    """An overlap outside of Pollux' range is refused."""
    with pytest.raises(ConfigError):
        PolluxLaw(largest_micro_batch_size=8, overlap=overlap)
