"""The ledger's sums: cumulative, through resumes, and without a figure where a part of it is not known."""

from __future__ import annotations

import json
import math

import pytest

from dptrain.cost.ledger import Ledger
from dptrain.errors import CheckpointError

STEP = {"seconds": 2.0, "num_samples": 10, "flops_per_sample": 3e9, "energy_j": 50.0, "bytes_sent": 1e6}


def _ledger(**options):
    return Ledger(**{"world_size": 4, "peak_flops_per_s": 1e10, "price_per_device_hour": 1.8, **options})


def test_a_step_is_entered_with_all_devices():
    """FLOPs of all samples; seconds, peak and money of all devices; the energy as it was summed."""
    ledger = _ledger()
    ledger.step(**STEP)
    assert ledger.columns() == {
        "ledger/flops": 3e10,
        "ledger/device_s": 8.0,
        "ledger/mfu": pytest.approx(3e10 / (1e10 * 8)),
        "ledger/energy_j": 50.0,
        "ledger/bytes_sent": 1e6,
        "ledger/cost": pytest.approx(8 / 3600 * 1.8),
    }


def test_a_pause_costs_time_and_money_and_no_utilisation():
    """An evaluation is paid for, but the devices do not train in it."""
    ledger = _ledger()
    ledger.step(**STEP)
    before = ledger.mfu
    ledger.pause(seconds=1.0, energy_j=5.0)
    assert (ledger.device_s, ledger.mfu) == (12.0, before)
    assert ledger.columns()["ledger/cost"] == pytest.approx(12 / 3600 * 1.8)
    assert ledger.columns()["ledger/energy_j"] == 55.0


def test_what_was_used_goes_on_after_a_resume():
    """Cut anywhere, through JSON, the end is the same to the last bit."""
    whole, first = _ledger(), _ledger()
    for _ in range(7):
        whole.step(**STEP)
    for _ in range(3):
        first.step(**STEP)
    second = _ledger()
    second.restore(json.loads(json.dumps(first.state())))
    for _ in range(4):
        second.step(**STEP)
    assert second.columns() == whole.columns()


def test_a_resume_on_other_devices_adds_their_share():
    """The utilisation is to what the devices of each attempt could have done."""
    first, second = _ledger(), _ledger(world_size=1, peak_flops_per_s=3e10, price_per_device_hour=3.6)
    first.step(**STEP)
    second.restore(first.state())
    second.step(**STEP)
    assert second.device_s == 8 + 2
    assert second.mfu == pytest.approx(6e10 / (1e10 * 8 + 3e10 * 2))
    assert second.columns()["ledger/cost"] == pytest.approx((8 * 1.8 + 2 * 3.6) / 3600)


@pytest.mark.parametrize(
    ("options", "step", "unknown"),
    [
        ({"peak_flops_per_s": None}, {}, "ledger/mfu"),
        ({"price_per_device_hour": None}, {}, "ledger/cost"),
        ({}, {"energy_j": math.nan}, "ledger/energy_j"),
        ({}, {"flops_per_sample": None}, "ledger/flops"),
    ],
)
def test_a_sum_with_a_hole_in_it_is_no_figure(options, step, unknown):
    """Once a part is unknown the figure is null, also after steps whose part is known, and also after a resume."""
    holed = _ledger(**options)
    holed.step(**{**STEP, **step})
    after = _ledger()
    after.restore(holed.state())
    after.step(**STEP)
    assert after.columns()[unknown] is None
    known = {name for name, value in after.columns().items() if value is not None}
    assert "ledger/device_s" in known
    assert len(known) == (4 if unknown == "ledger/flops" else 5)  # without FLOPs there is no utilisation either


def test_the_figures_have_petaflop_s_days():
    """A petaflop/s for a day is 8.64e19 FLOPs."""
    ledger = _ledger()
    ledger.step(**{**STEP, "flops_per_sample": 8.64e18})
    figures = ledger.figures()
    assert figures["petaflop_s_days"] == pytest.approx(1.0)
    assert figures["peak_flops_per_s"] == 1e10
    assert {"flops", "device_s", "mfu", "energy_j", "cost"} <= figures.keys()


def test_before_the_first_step_nothing_was_used():
    """No utilisation of nothing."""
    assert _ledger().columns() == {
        "ledger/flops": 0.0,
        "ledger/device_s": 0.0,
        "ledger/mfu": None,
        "ledger/energy_j": 0.0,
        "ledger/bytes_sent": 0.0,
        "ledger/cost": 0.0,
    }


def test_a_state_of_something_else_is_refused():
    """With what was found."""
    with pytest.raises(CheckpointError, match="ledger"):
        _ledger().restore({"flops": 1.0, "nonsense": 2})
