"""Whole simulated runs under the default law: the share of the fastest time, fourteen ways a run could be."""

import pytest

from dptrain.control.goodput import GoodputLaw
from tests.control.simulated.simulation import CASES, LARGEST_MICRO, efficiency

LAW = GoodputLaw(largest_micro_batch_size=LARGEST_MICRO, no_decrease_samples=400)
LEAST = {"16 times too large": 0.8, "300 ms a step": 0.75, "rises ×100, κ = 4": 0.8}
"""Of one seed. From far above the first steps alone cost a tenth; a critical ratio that is off by 4 costs as much."""


@pytest.mark.parametrize("name", CASES)
def test_a_run_makes_most_of_the_fastest_time(name):
    """From 16 times off, under a noise scale that rises, falls or jumps, on slow and on idle machines."""
    share, changes = efficiency(LAW, CASES[name], seed=0)
    assert share >= LEAST.get(name, 0.93)
    assert changes <= 40
