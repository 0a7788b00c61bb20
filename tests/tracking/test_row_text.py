"""The words for a row are those that its numbers bear."""

from __future__ import annotations

import pytest

from dptrain.tracking.row_text import noise_scale_text
from tests.tracking.made_views import train_row


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "210 [150, 330]"),
        ({"noise_scale/value": 1200.0, "noise_scale/lower": 930.0, "noise_scale/upper": 1649.0}, "1.2k [0.9k, 1.6k]"),
        ({"noise_scale/value": 1200.0, "noise_scale/lower": 20.0, "noise_scale/upper": None}, "1.2k [20, ∞]"),
        (
            {"noise_scale/value": 12_000_000.0, "noise_scale/lower": 9_000_000.0, "noise_scale/upper": 2e7},
            "12M [9.0M, 20M]",
        ),
        ({"noise_scale/value": 3.24, "noise_scale/lower": 0.5, "noise_scale/upper": 9.97}, "3.2 [0.5, 10]"),
        (
            {
                "noise_scale/state": "at least",
                "noise_scale/value": None,
                "noise_scale/lower": 800.0,
                "noise_scale/upper": None,
            },
            "at least 800",
        ),
        ({"noise_scale/state": "not resolved yet", "noise_scale/lower": 0.0}, "not resolved yet"),
        ({"noise_scale/state": "resolved", "noise_scale/value": None}, "not resolved yet"),
        ({"noise_scale/state": None}, "not measured"),
    ],
)
def test_the_noise_scale_is_said_as_it_is_known(changes, text):
    """A value comes with its interval, a bound as a bound, and nothing as nothing."""
    assert noise_scale_text(train_row(**changes)) == text
