"""The sentences of a plan, on plans whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.cost.prices import DevicePrice
from dptrain.explain.model.compute import Compute
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.plan import make_plan
from dptrain.explain.text import plan_text
from tests.ideal_runs import ideal_record


@pytest.fixture(scope="module")
def plan():
    record = ideal_record()
    return make_plan(record, devices(record), numbers=[1, 2, 8, 64], price=DevicePrice.given(100.0))


def _at(plan, **seconds):
    """The plan with made-up times and costs at some of its points."""
    points = tuple(
        replace(point, seconds=seconds[f"on_{point.num_devices}"], cost=float(point.num_devices))
        if f"on_{point.num_devices}" in seconds
        else point
        for point in plan.points
    )
    return replace(plan, points=points)


def test_the_headline_tells_two_points_and_the_end(plan):
    """The run's own number of devices and the knee, each with time and money."""
    reported = replace(_at(plan, on_2=3.1 * 3600, on_8=0.61 * 3600), knee=8, ceiling=90)
    assert plan_text.headline(reported) == "2 GPUs: 3.1 h, 2 $; 8 GPUs: 0.61 h, 8 $; no gain beyond 90 GPUs"


def test_a_run_at_its_knee_tells_one_point(plan):
    """And without an end in sight, that the time still falls."""
    reported = replace(_at(plan, on_2=100.0), knee=2, ceiling=None)
    assert plan_text.headline(reported) == "2 GPUs: 100 s, 2 $; still faster at 64 GPUs"
    assert plan_text.traded(reported, "samples", lambda point: point.samples) == "2 GPUs: at the knee"


def test_what_more_devices_buy(plan):
    """How much faster, and for how much more of what."""
    reported = replace(_at(plan, on_2=100.0, on_8=50.0), knee=8)
    assert plan_text.traded(reported, "money", lambda point: point.cost) == "2 → 8 GPUs: 2× as fast, 4× the money"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.512, "0.51 s"),
        (45, "45 s"),
        (119, "120 s"),
        (150, "2.5 min"),
        (1800, "0.5 h"),
        (11_111, "3.1 h"),
        (3e5, "3.5 days"),
    ],
)
def test_times_are_written_with_two_digits(seconds, text):
    """In the unit that suits them."""
    assert plan_text.about(seconds) == text


def test_the_doubt_names_interval_and_history(plan):
    """Both ranges of the run's own number of devices, and where the factor of six is from."""
    own = replace(
        plan.points[1],
        samples_range=(30_000.0, 41_000.0),
        seconds_range=(3600.0, 7200.0),
        seconds_history=(1800.0, 36_000.0),
    )
    text = plan_text.doubt(replace(plan, points=(plan.points[0], own, *plan.points[2:])))
    assert text.startswith(
        "Time on 2 GPUs: 1 h–2 h for 30,000 to 41,000 samples (noise scale, critical ratio and fits); 0.5 h–10 h if"
    )
    assert "off by 6×" in text


def test_the_goal_says_where_it_lies(plan):
    """Within the run or beyond it."""
    assert "reached by the run after" in plan_text.goal(plan)
    assert plan_text.goal(replace(plan, samples_of_run=None, target=0.5)).startswith(
        "Target: held-out loss 0.5, extrapolated: the run reached"
    )


@pytest.mark.parametrize(
    ("by_count", "by_time", "said"),
    [
        (
            8.64e19,
            17.28e19,
            "1 petaflop/s-days counted, 2 by device time at 33 % of peak (ratio 2)",
        ),
        (8.64e19, None, "1 petaflop/s-days counted; not checked, the peak"),
        (None, 8.64e19, "were not counted"),
        (None, None, "unknown"),
    ],
)
def test_compute_is_reported_by_what_is_known(plan, by_count, by_time, said):
    """Both methods and their disagreement, or which of them is missing and why."""
    assert said in plan_text.compute(replace(plan, compute_of_run=Compute(by_count=by_count, by_time=by_time)))


def test_no_sentence_speaks_of_an_optimal_batch(plan):
    """But to deny it."""
    reported = " ".join(
        [
            plan_text.headline(plan),
            plan_text.goal(plan),
            plan_text.doubt(plan),
            plan_text.trade_off(plan),
            plan_text.step_times(plan),
        ]
    )
    assert "optim" not in reported
    assert plan_text.NO_OPTIMUM.startswith("The noise scale is not the optimal batch size")
    assert "critical batch size" in plan_text.trade_off(plan)


def test_without_a_price_time_of_devices_stands_for_it(plan):
    """In hours."""
    point = replace(plan.points[0], cost=None, device_s=7200.0)
    assert plan_text.price(plan, point) == "2 GPU-hours"
    assert plan_text.energy(1.8e7) == "5 kWh"
