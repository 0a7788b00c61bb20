"""The batch grid: its points, its bounds, and what one decision may reach."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.control import BatchSizeGrid
from dptrain.errors import ConfigError

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


def test_candidates_are_all_smaller_ones_and_twice_the_batch():
    """One decision may shrink to any point, and at most double."""
    grid = BatchSizeGrid(quantum=8, smallest=16, largest=1024)
    assert grid.candidates(64) == (16, 32, 64, 128)
    assert grid.candidates(1024) == (16, 32, 64, 128, 256, 512, 1024)
    assert grid.candidates(8) == (16,)
    assert grid.candidates(48) == (16, 32, 64)
    assert BatchSizeGrid(quantum=8, largest=64, powers_of_two=False).candidates(16) == (8, 16, 24, 32)
    assert len(BatchSizeGrid(quantum=1, largest=1 << 20, powers_of_two=False).candidates(1 << 18)) < 320


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quantum": 8, "smallest": 9, "largest": 15}, "largest must be at least 16"),
        ({"quantum": 8, "largest": 7}, "largest must be at least 8"),
        ({"quantum": 6, "smallest": 7, "largest": 11}, "6, 12, 24, …"),
    ],
)
def test_a_grid_without_a_point_is_refused(settings, complaint):
    """Bounds that leave no batch are refused, with the batches that could run."""
    with pytest.raises(ConfigError, match=complaint):
        BatchSizeGrid(**settings)
