"""The wrapper round every law: bounds and rounding, and the law's own state passed through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import BatchSizeGrid, Measurement, OnGrid
from dptrain.control.noise_law import NoiseLaw
from dptrain.control.schedule import Constant, Schedule, Stage
from dptrain.errors import ConfigError
from tests.control.known import Known


def measured(batch, seen=0):
    return Measurement(samples_seen=seen, global_batch_size=batch, noise_scale=Known(1000.0))


@given(asked=st.integers(1, 10**6), quantum=st.integers(1, 100))
def test_what_is_asked_for_is_rounded_to_the_grid(asked, quantum):
    """Whatever a law asks for, the decision is a whole number of quanta, doubled, within the bounds."""
    control = OnGrid(Constant(asked), BatchSizeGrid(quantum=quantum, largest=10_000))
    _, decision = control.update(control.init(), measured(quantum))
    assert isinstance(decision.global_batch_size, int)
    assert quantum <= decision.global_batch_size <= 10_000
    assert (decision.global_batch_size // quantum).bit_count() == 1
    assert ("nearest on the batch grid" in decision.reason) == (decision.global_batch_size != asked)


def test_a_schedule_by_hand_may_have_any_multiple():
    """Without powers of two a batch of 24 on a quantum of 8 is kept, and 27 becomes the nearest multiple."""
    control = OnGrid(Schedule((Stage(0, 24), Stage(10, 27))), BatchSizeGrid(quantum=8, largest=64, powers_of_two=False))
    batches = [control.update(control.init(), measured(8, seen))[1].global_batch_size for seen in (0, 10)]
    assert batches == [24, 24]


def test_the_law_finds_the_grid_in_the_measurement():
    """A law that compares batches works behind the wrapper, and says what is missing without it."""
    control = OnGrid(NoiseLaw(), BatchSizeGrid(quantum=8, largest=64))
    _, decision = control.update(control.init(), measured(8))
    assert decision.global_batch_size == 16
    with pytest.raises(AssertionError, match="wrap it in `OnGrid`"):
        NoiseLaw().decide(measured(8))


def test_bounds_without_a_batch_are_refused():
    """Bounds between which nothing runs are refused when the run is set up."""
    with pytest.raises(ConfigError, match="can run"):
        BatchSizeGrid(quantum=16, smallest=17, largest=31)


def test_the_state_is_that_of_the_law():
    """The wrapper remembers nothing of its own."""
    law = NoiseLaw()
    control = OnGrid(law, BatchSizeGrid(quantum=8, largest=64))
    assert control.init() == law.init()
    assert control.restore({"global_batch_size": 8, "num_steps": 3}) == law.restore(
        {"global_batch_size": 8, "num_steps": 3}
    )
