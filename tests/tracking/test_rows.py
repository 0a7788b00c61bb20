"""What a run says of its noise scale at its end."""

from __future__ import annotations

from dptrain.noise import Moments, PresentState, noise_scale, present_moments, present_updated
from dptrain.tracking.rows import noise_figures, noise_scale_text, train_row


def test_a_run_that_never_measured_is_not_one_that_waits():
    """Without a measured step (mode=off, or no noise scale under the exchange) it is not measured, not unresolved."""
    assert noise_scale_text(noise_scale(None)) == "noise scale not measured"
    assert noise_figures(noise_scale(None))["noise_scale"] is None
    row = train_row({"step": 1}, noise_scale=noise_scale(None), groups={"head": noise_scale(None)})
    assert row == {"kind": "train", "step": 1}, "a column of a quantity that was not measured is left out"


def test_a_measured_run_names_now_and_the_window():
    """Each under its own name, also where neither is resolved."""
    moments = Moments(noise_trace=1.0, grad_sq_norm=1.0, num_samples=8, num_small=2)
    scale = noise_scale(present_moments(present_updated(PresentState(), moments)))
    assert noise_scale_text(scale) == "noise scale now not resolved yet; running mean: not resolved"
