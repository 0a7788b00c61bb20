"""The answers to those who pay, on plans whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.cost.prices import DevicePrice
from dptrain.explain.model.compute import trend_place
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.model_sizes import paid_sizes
from dptrain.explain.model.plan import make_plan
from dptrain.explain.text.rental_text import answers, comparison, sizes, sizes_of_budget, trend
from tests.ideal_runs import ideal_record

PRICE = DevicePrice(low=1.0, typical=2.0, high=6.0, providers=("a", "b"), read="2026-01-01")
PFD = 8.64e19


@pytest.fixture(scope="module")
def plan():
    """1 and 8 H100s at 2 $ an hour: 10 h for 20 $ [2.5, 120], 2 h for 32 $ [4, 96]."""
    record = ideal_record()
    made = make_plan(record, devices(record), numbers=[1, 8], price=PRICE)
    points = tuple(
        replace(point, seconds=3600 * hours, seconds_range=(900 * hours, 7200 * hours), cost=cost)
        for point, hours, cost in zip(made.points, (10.0, 2.0), (20.0, 32.0), strict=True)
    )
    return replace(made, points=points, knee=8, device="H100 GPU", assumptions=("utilisation 33 % of 989.4 TFLOP/s",))


def _answers(plan, *, within_h=6.0, budget=25.0):
    return answers([plan], within_s=3600 * within_h, budget=budget, prices="on demand")


def test_three_questions_have_two_sentences_each(plan):
    """Time and money with their ranges first, what it assumes second."""
    how_long, cheapest, fastest = _answers(plan)
    assert how_long.question == "How long does it take on H100 GPUs, and what does it cost?"
    assert how_long.answer.startswith("8 H100 GPUs: 2 h [0.5 h, 4 h] and 32 $ [4 $, 190 $]")
    assert cheapest.question == "What is the cheapest within 6 h?"
    assert cheapest.answer.startswith("8 H100 GPUs: 2 h")
    assert fastest.question == "What is the fastest below 25 $?"
    assert fastest.answer.startswith("1 H100 GPU: 10 h [2.5 h, 20 h] and 20 $ [2.5 $, 120 $]")
    for one in (how_long, cheapest, fastest):
        assert "utilisation 33 %" in one.assumes
        assert "2 $ per H100 GPU-hour [1 $, 6 $] (on demand, read 2026-01-01)" in one.assumes
        assert "noise scale" in one.assumes


def test_what_cannot_be_had_is_said_with_the_nearest(plan):
    """The fastest where nothing is in time, the cheapest where nothing is in the budget."""
    _, cheapest, fastest = _answers(plan, within_h=1.0, budget=5.0)
    assert cheapest.answer.startswith("Nothing that was planned takes less than 1 h; the fastest is 8 H100 GPUs: 2 h")
    assert fastest.answer.startswith("Nothing that was planned costs less than 5 $; the cheapest is 1 H100 GPU: 10 h")


def test_the_comparison_has_the_cheapest_and_the_knee(plan):
    """A row for each device."""
    assert comparison([plan]) == [("H100 GPU", "1", "10 h", "20 $", "8", "2 h", "32 $")]


def test_the_sizes_are_those_of_the_run_and_of_both_laws(plan):
    """With the family, and the warning that the laws were fitted elsewhere."""
    record = replace(
        ideal_record(summary={"task": "pysource"}), facts={"num_parameters": 459_392, "tokens_per_sample": 64}
    )
    text = sizes(replace(plan, paid_sizes=paid_sizes(record, flops=7e12, num_samples=40_000)))
    assert "459,000 parameters on 2.56 million tokens" in text
    assert "Hoffmann 2022" in text
    assert "ready-made gpt is tiny" in text
    assert "an extrapolation" in text
    assert sizes(replace(plan, paid_sizes=None)) is None


def test_a_budget_pays_for_a_model(plan):
    """100 $ at 2 $ an hour are 50 hours; at 10^14 FLOP/s 1.8e19 FLOPs, which 6·N·D must come to."""
    record = replace(ideal_record(), facts={"num_parameters": 1_000, "tokens_per_sample": 64})
    able = replace(plan, flops_per_s=1e14, paid_sizes=paid_sizes(record, flops=7e12, num_samples=1))
    text = sizes_of_budget(able, 100.0)
    assert text.startswith("A language model for 100 $: 50 H100 GPU-hours compute 1.8e+19 FLOPs")
    assert "Hoffmann 2022" in text
    assert sizes_of_budget(replace(able, paid_sizes=None), 100.0) is None
    assert sizes_of_budget(replace(able, flops_per_s=None), 100.0) is None


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (0.0058 * PFD, "in 2012.7"),
        (0.0058 * 2**10 * PFD, "in 2015.5"),
        (0.0058 / 8 * PFD, "3.0 doublings below its first point, AlexNet"),
        (0.0058 * 2**20 * PFD, "20.0 doublings above its first point, AlexNet"),
    ],
)
def test_the_place_on_the_trend(plan, flops, text):
    """Ten doublings of 3.4 months are 2.8 years; beyond the article's years no year is named."""
    assert text in trend(replace(plan, trend=trend_place(flops)))
    assert trend(replace(plan, trend=None)) is None
