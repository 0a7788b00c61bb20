"""What becomes of one step's sums: counted, or dropped and counted as that."""

from __future__ import annotations

import math
import random

import pytest

from dptrain.errors import ObservationError
from dptrain.observe.estimate import Estimate, from_record, to_record

SIZES = [0.5, 0.25, 1.0, 2.0, 1.0, 4.0]
"""Two micro-batches of two samples on one replica, with weights of a half."""


def sums(*, small, large):
    return [small, large, *SIZES]


def grouped_sums(*, small, large):
    return [*small, *large, *SIZES]


def test_a_step_is_taken_in():
    """‖g_k‖² of 4 and 2 in the mean and ‖g‖² = 2 are tr(Σ) = 4 and |G|² = 1."""
    estimate = Estimate(world_size=1)
    norms = estimate.absorb(sums(small=3.0, large=2.0))
    assert (norms.small, norms.large) == (3.0, 2.0)
    assert (estimate.read().noise_trace, estimate.read().grad_sq_norm) == (4.0, 1.0)
    assert (estimate.state.steps_measured, estimate.steps_dropped) == (1, 0)


def test_what_is_read_is_never_older_than_what_was_taken_in():
    """A reading stands until the next step is taken in, or another state."""
    estimate = Estimate(world_size=1)
    assert estimate.read().num_steps == 0
    estimate.absorb(sums(small=3.0, large=2.0))
    one, state = estimate.read(), estimate.state
    assert estimate.read() is one
    estimate.absorb(sums(small=5.0, large=2.0))
    assert (one.num_steps, estimate.read().num_steps) == (1, 2)
    estimate.restore(state)
    assert estimate.read() == one


@pytest.mark.parametrize(
    ("small", "large"),
    [(math.nan, 2.0), (3.0, math.inf), (3e101, 2e101), (3e-105, 2e-105)],
    ids=["not a number", "infinite", "too large for its square", "too small for its square"],
)
def test_a_pair_that_cannot_be_held_is_a_dropped_step(small, large):
    """Sums that the smoothing refuses count as dropped and not as measured, in the groups as in the whole."""
    estimate = Estimate(names=("a", "b"), world_size=1)
    estimate.absorb(grouped_sums(small=[2.0, 1.0], large=[1.5, 0.5]))
    before = estimate.state
    assert estimate.absorb(grouped_sums(small=[small, small], large=[large, large])) is None
    assert (estimate.state.sums, estimate.state.groups) == (before.sums, before.groups)
    assert (estimate.state.steps_measured, estimate.steps_dropped) == (1, 1)


def test_one_small_batch_is_a_dropped_step():
    """With nothing to compare there is no pair."""
    estimate = Estimate(world_size=1)
    assert estimate.absorb([2.0, 2.0, 0.5, 0.5, 1.0, 1.0, 1.0, 2.0]) is None
    assert (estimate.state.steps_measured, estimate.steps_dropped) == (0, 1)


def test_a_record_is_the_whole_state():
    """What is written reads back the same, and a record of something else is refused."""
    estimate = Estimate(names=("a", "b"), world_size=1)
    estimate.absorb(grouped_sums(small=[2.0, 1.0], large=[1.5, 0.5]))
    estimate.absorb(grouped_sums(small=[math.nan, math.nan], large=[0.0, 0.0]))
    assert from_record(to_record(estimate.state)) == estimate.state
    with pytest.raises(ObservationError, match="not the state of a meter"):
        from_record({"sums": {}})


def test_a_step_larger_than_the_data_set_is_refused():
    """Samples that occur twice in a step would read a third of the noise scale: it is dropped, and said so."""
    estimate = Estimate(world_size=1, population=3)
    assert estimate.absorb(sums(small=3.0, large=2.0)) is None
    assert (estimate.steps_dropped, estimate.read().num_steps) == (1, 0)
    assert "larger than the data set of 3" in " ".join(estimate.read().warnings)
    assert Estimate(world_size=1, population=4).absorb(sums(small=3.0, large=2.0)) is not None


def test_the_reading_has_the_present_and_the_window():
    """After |G|² fell to a tenth the value is the present one, and the window mean keeps its own name."""
    estimate = Estimate(world_size=1)
    rng = random.Random(1)
    for number in range(400):
        grad = (10.0 if number < 360 else 1.0) * (1 + rng.gauss(0, 0.05))
        trace = 4 * (1 + rng.gauss(0, 0.05))
        estimate.absorb(sums(small=grad + trace / 2, large=grad + trace / 4))
    scale = estimate.read()
    assert scale.lower < 4 < scale.upper
    assert scale.value == pytest.approx(4, rel=0.1)
    assert scale.window_mean == estimate.read_window().value < 2
