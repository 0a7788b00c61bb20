"""The layout of one step: every sample exactly once, in order, evenly, whatever the shape."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.data.window import (
    Slot,
    accumulation_steps,
    choose_micro_batch_size,
    is_full,
    micro_batch_sizes,
    slots,
)
from dptrain.errors import ConfigError

shapes = st.fixed_dictionaries(
    {
        "position": st.integers(0, 10**12),
        "global_batch_size": st.integers(1, 300),
        "micro_batch_size": st.integers(1, 40),
        "world_size": st.integers(1, 17),
    }
)


def all_slots(shape):
    of_ranks = [slots(**shape, rank=rank) for rank in range(shape["world_size"])]
    return [slot for micro_step in zip(*of_ranks, strict=True) for slot in micro_step]


@given(shape=shapes)
def test_the_slots_divide_the_window(shape):
    """Read by micro-step, then by rank, the slots are contiguous from the first position to the last."""
    begin = shape["position"]
    for slot in all_slots(shape):
        assert slot.position == begin
        begin += slot.num_samples
    assert begin == shape["position"] + shape["global_batch_size"]


@given(shape=shapes)
def test_the_work_is_even(shape):
    """Sizes differ by at most one, the larger come first, none exceeds the micro-batch, all ranks have as many."""
    sizes = [slot.num_samples for slot in all_slots(shape)]
    filled = [size for size in sizes if size]
    assert sizes == sorted(sizes, reverse=True)
    assert max(filled) - min(filled) <= 1
    assert max(filled) <= shape["micro_batch_size"]
    assert len(sizes) - len(filled) < shape["world_size"]
    layout = {name: size for name, size in shape.items() if name != "position"}
    assert len(sizes) == accumulation_steps(**layout) * shape["world_size"]
    assert is_full(**layout) == (set(sizes) == {shape["micro_batch_size"]})


@given(shape=shapes, other=st.integers(1, 17))
def test_any_number_of_replicas_computes_the_same_micro_batches(shape, other):
    """The micro-batches of a step, as (position, samples), depend on no world size."""
    of_all = [
        {(slot.position, slot.num_samples) for slot in all_slots(shape | {"world_size": size}) if slot.num_samples}
        for size in (shape["world_size"], other)
    ]
    assert of_all[0] == of_all[1]


@given(shape=shapes)
def test_no_micro_step_is_wasted(shape):
    """One micro-step fewer could not hold the batch."""
    num_micro_steps = len(slots(**shape, rank=0))
    assert (num_micro_steps - 1) * shape["micro_batch_size"] * shape["world_size"] < shape["global_batch_size"]


def test_one_rank_of_many_is_cheap():
    """A rank's slots are found without counting through the ranks."""
    shape = {"position": 0, "global_batch_size": 10**12 + 1, "micro_batch_size": 1, "world_size": 10**12}
    assert slots(**shape, rank=5) == (
        Slot(micro_step=0, rank=5, position=5, num_samples=1),
        Slot(micro_step=1, rank=5, position=10**12 + 1, num_samples=0),
    )


@pytest.mark.parametrize("name", ["global_batch_size", "micro_batch_size", "world_size"])
def test_sizes_below_one_are_refused(name):
    """A step without samples, micro-batch or replicas is refused with its values."""
    shape = {"global_batch_size": 8, "micro_batch_size": 2, "world_size": 4} | {name: 0}
    with pytest.raises(ConfigError, match=f"{name} 0"):
        accumulation_steps(**shape)
    with pytest.raises(ConfigError, match=f"{name} 0"):
        slots(**shape, position=0, rank=0)


@given(largest=st.integers(1, 10**6))
def test_the_sizes_are_few_and_end_where_asked(largest):
    """Sizes ascend, begin at 1, end at the largest, and at most double."""
    grid = micro_batch_sizes(largest)
    assert grid[0] == 1
    assert grid[-1] == largest
    assert all(lower < upper <= 2 * lower for lower, upper in itertools.pairwise(grid))
    assert len(grid) <= largest.bit_length() + 1


@pytest.mark.parametrize(("largest", "grid"), [(1, (1,)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))])
def test_known_sizes(largest, grid):
    """Powers of two, and the largest itself."""
    assert micro_batch_sizes(largest) == grid


def test_an_empty_list_is_refused():
    """The largest micro-batch holds at least one sample."""
    with pytest.raises(ConfigError, match="got 0"):
        micro_batch_sizes(0)


@given(
    grid_point=st.integers(1, 64), repeats=st.integers(1, 50), world_size=st.integers(1, 9), largest=st.integers(1, 64)
)
def test_a_divisible_batch_is_laid_out_with_full_micro_batches(grid_point, repeats, world_size, largest):
    """The choice is full, and no larger size would be."""
    global_batch_size = grid_point * repeats * world_size
    layout = {"global_batch_size": global_batch_size, "world_size": world_size}
    chosen = choose_micro_batch_size(**layout, largest=largest)
    assert is_full(**layout, micro_batch_size=chosen)
    larger = [grid_point for grid_point in micro_batch_sizes(largest) if grid_point > chosen]
    assert not any(is_full(**layout, micro_batch_size=grid_point) for grid_point in larger)


@pytest.mark.parametrize(
    ("global_batch_size", "world_size", "largest", "chosen"),
    [(1024, 3, 64, 64), (7, 2, 64, 4), (3, 4, 64, 1), (1024, 3, 1000, 256)],
)
def test_an_indivisible_batch_takes_the_largest_size_within_a_replicas_share(
    global_batch_size, world_size, largest, chosen
):
    """Where the world size does not divide the batch, no micro-batch is larger than it can ever be filled."""
    layout = {"global_batch_size": global_batch_size, "world_size": world_size, "largest": largest}
    assert choose_micro_batch_size(**layout) == chosen
