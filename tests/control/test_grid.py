"""The batch grid: its points, its bounds, what one decision may reach, and the wrapper that holds laws to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import BatchSizeGrid, Constant, GoodputLaw, Limits, Measurement, NoiseLaw, Schedule, limited
from dptrain.errors import ConfigError
from tests.control.known import Known

sizes = st.integers(1, 10**4)


@given(quantum=sizes, smallest=sizes, span=st.integers(0, 10**6), powers=st.booleans(), batch=st.floats(0.1, 1e7))
def test_nearest_is_a_grid_point_within_the_bounds(quantum, smallest, span, powers, batch):
    """The nearest batch is a point of the grid within the bounds, and no other one has a smaller ratio to the batch."""
    try:
        grid = BatchSizeGrid(quantum=quantum, smallest=smallest, largest=smallest + span, powers_of_two=powers)
    except ConfigError:
        return
    nearest = grid.nearest(batch)
    assert smallest <= nearest <= smallest + span
    assert nearest % quantum == 0
    assert not powers or (nearest // quantum).bit_count() == 1
    others = {grid.nearest(nearest / 2), grid.nearest(2 * nearest), nearest + quantum, nearest - quantum}
    for other in others:
        if grid.nearest(other) == other:
            assert max(nearest / batch, batch / nearest) <= max(other / batch, batch / other) * (1 + 1e-9)


def test_half_and_double_are_equally_far():
    """Between 64 and 128 the border is their geometric mean."""
    grid = BatchSizeGrid(quantum=8, largest=1024)
    assert [grid.nearest(batch) for batch in (64, 90, 91, 128)] == [64, 64, 128, 128]


def test_candidates_are_all_smaller_ones_and_the_double():
    """One decision may shrink to any point, and grow to the double at most."""
    grid = BatchSizeGrid(quantum=8, smallest=16, largest=1024)
    assert grid.candidates(64) == (16, 32, 64, 128)
    assert grid.candidates(1024) == (16, 32, 64, 128, 256, 512, 1024)
    assert grid.candidates(8) == (16,)
    assert BatchSizeGrid(quantum=8, largest=64, powers_of_two=False).candidates(16) == (8, 16, 24, 32)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quantum": 0, "largest": 8}, "quantum"),
        ({"quantum": 8, "smallest": 9, "largest": 15}, "largest must be at least 16"),
        ({"quantum": 8, "largest": 7}, "largest must be at least 8"),
        ({"quantum": 6, "smallest": 7, "largest": 11}, "6, 12, 24, …"),
    ],
)
def test_a_grid_without_a_point_is_refused(settings, complaint):
    """Bounds that leave no batch are refused, with the batches that could run."""
    with pytest.raises(ConfigError, match=complaint):
        BatchSizeGrid(**settings)


def measured(batch, seen=0):
    return Measurement(samples_seen=seen, global_batch_size=batch, noise_scale=Known(1000.0))


@given(asked=st.integers(1, 10**6), quantum=st.integers(1, 100))
def test_what_is_asked_for_is_rounded_to_the_grid(asked, quantum):
    """Whatever a law asks for, the decision is a whole number of quanta, doubled, within the bounds."""
    control = limited(Constant(asked), quantum=quantum, limits=Limits(largest=10_000))
    _, decision = control.update(control.init(), measured(quantum))
    assert isinstance(decision.global_batch_size, int)
    assert quantum <= decision.global_batch_size <= 10_000
    assert (decision.global_batch_size // quantum).bit_count() == 1
    assert ("nearest on the batch grid" in decision.reason) == (decision.global_batch_size != asked)


def test_a_schedule_by_hand_may_have_any_multiple():
    """Without powers of two a batch of 24 on a quantum of 8 is kept, and 27 becomes the nearest multiple."""
    control = limited(Schedule.parse("0:24 10:27"), quantum=8, limits=Limits(largest=64), powers_of_two=False)
    batches = [control.update(control.init(), measured(8, seen))[1].global_batch_size for seen in (0, 10)]
    assert batches == [24, 24]


def test_the_law_finds_the_grid_in_the_measurement():
    """A law that compares batches works behind the wrapper, and says what is missing without it."""
    control = limited(NoiseLaw(), quantum=8, limits=Limits(largest=64))
    _, decision = control.update(control.init(), measured(8))
    assert decision.global_batch_size == 16
    with pytest.raises(AssertionError, match="wrap it in `limited`"):
        NoiseLaw().decide(measured(8))


def test_bounds_without_a_batch_are_refused():
    """Bounds between which nothing runs are refused when the run is set up."""
    with pytest.raises(ConfigError, match="can run"):
        limited(GoodputLaw(largest_micro_batch_size=8), quantum=16, limits=Limits(smallest=17, largest=31))


def test_the_state_is_that_of_the_law():
    """The wrapper remembers nothing of its own."""
    law = NoiseLaw()
    control = limited(law, quantum=8, limits=Limits(largest=64))
    assert control.init() == law.init()
    assert control.restore({"global_batch_size": 8, "num_steps": 3}) == law.restore(
        {"global_batch_size": 8, "num_steps": 3}
    )
