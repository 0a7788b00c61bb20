"""The interval between checkpoints: where the loss is least, and never one that the writer or the stall forbids."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.checkpoint.interval import young_daly_s

SECONDS = st.floats(1e-6, 1e6)


def test_the_figures_of_the_formula():
    """Half a second of stall and a failure every 8 hours ask for √(2 · 0.5 · 28,800) s: about 170 s."""
    assert young_daly_s(stall_s=0.5, write_s=1.0, mean_time_between_failures_s=28_800.0) == pytest.approx(
        169.7, abs=0.1
    )


@given(stall_s=SECONDS, write_s=SECONDS, mtbf_s=SECONDS, other=st.floats(0.01, 100))
def test_no_other_allowed_interval_loses_less(stall_s, write_s, mtbf_s, other):
    """The time lost per time trained, to stalls and to work done again, is least there, within both bounds."""

    def lost(interval_s):
        return stall_s / interval_s + interval_s / (2 * mtbf_s)

    best_s = young_daly_s(stall_s=stall_s, write_s=write_s, mean_time_between_failures_s=mtbf_s)
    assert best_s >= write_s
    assert stall_s <= 0.01 * best_s * (1 + 1e-9)
    other_s = max(best_s * other, write_s, 100 * stall_s)
    assert lost(best_s) <= lost(other_s) * (1 + 1e-9)


def test_a_job_that_fails_more_often_saves_more_often():
    """Until the write or one per cent of stall holds it back."""
    found = [
        young_daly_s(stall_s=0.1, write_s=3.0, mean_time_between_failures_s=mtbf_s) for mtbf_s in (1e6, 1e4, 1e2, 1.0)
    ]
    assert found == [pytest.approx(math.sqrt(2e5)), pytest.approx(math.sqrt(2e3)), 10.0, 10.0]
    assert young_daly_s(stall_s=0.1, write_s=30.0, mean_time_between_failures_s=1.0) == 30.0
