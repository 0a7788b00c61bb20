"""The division of a step among ranks that come and go: every sample once, the same micro-batches, exact weights."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dptrain.data.elastic_batch import ElasticBatch
from dptrain.data.window import slots
from dptrain.errors import ConfigError

batches = st.builds(
    ElasticBatch,
    global_batch_size=st.integers(1, 300),
    micro_batch_size=st.integers(1, 40),
    position=st.integers(0, 10**12),
    steps_done=st.integers(0, 10**6),
)
world_sizes = st.integers(1, 17)
histories = st.lists(st.tuples(st.integers(1, 90), world_sizes, st.booleans()), min_size=1, max_size=12)
"""Steps of a run: (global batch of the next step, ranks at the time, whether a failure has undone the step)."""


def of_all_ranks(batch, *, world_size):
    """The micro-batches of all ranks that are no fillers."""
    of_ranks = [batch.micro_batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    return [micro for mine in of_ranks for micro in mine if micro.num_samples]


@given(history=histories)
def test_every_sample_is_seen_exactly_once(history):
    """Whatever ranks come, go and fail, the steps that were applied cover each position once, without a gap."""
    batch, seen = ElasticBatch(global_batch_size=7, micro_batch_size=4), []
    for next_size, world_size, undone in history:
        step = [position for micro in of_all_ranks(batch, world_size=world_size) for position in micro.positions]
        if not undone:
            seen += step
            batch = batch.after_step(global_batch_size=next_size)
    assert sorted(seen) == list(range(batch.position))
    assert batch.steps_done == sum(not undone for _, _, undone in history)


@given(batch=batches, one=world_sizes, other=world_sizes)
def test_the_cut_depends_on_no_world_size(batch, one, other):
    """Any number of ranks runs the same micro-batches, as sets of positions."""
    cuts = [{micro.positions for micro in of_all_ranks(batch, world_size=size)} for size in (one, other)]
    assert cuts[0] == cuts[1]


@given(history=histories, world_size=world_sizes)
def test_the_cut_depends_on_no_history(history, world_size):
    """A run that reached a position by other batches and ranks, or by its four numbers, cuts the step the same way."""
    batch = ElasticBatch(global_batch_size=7, micro_batch_size=4)
    for next_size, _, _ in history:
        batch = batch.after_step(global_batch_size=next_size)
    fresh = ElasticBatch(position=batch.position, global_batch_size=batch.global_batch_size, micro_batch_size=4)
    restored = ElasticBatch.from_state_dict(json.loads(json.dumps(batch.state_dict())))
    assert restored == batch
    for rank in range(world_size):
        of_rank = batch.micro_batches(rank=rank, world_size=world_size)
        assert of_rank == fresh.micro_batches(rank=rank, world_size=world_size)
        assert of_rank == restored.micro_batches(rank=rank, world_size=world_size)


@given(batch=batches, world_size=world_sizes)
def test_the_weights_are_exact(batch, world_size):
    """The fractions of all micro-batches sum to 1; weight is fraction × world size; fillers weigh nothing."""
    everything = [
        micro for rank in range(world_size) for micro in batch.micro_batches(rank=rank, world_size=world_size)
    ]
    assert sum(micro.fraction for micro in everything) == Fraction(1)
    assert all(micro.weight == float(micro.fraction * world_size) for micro in everything)
    assert all(micro.num_samples <= batch.micro_batch_size for micro in everything)


@given(batch=batches, world_size=world_sizes)
def test_the_ranks_combine_once_and_together(batch, world_size):
    """All ranks run equally many micro-batches, and each combines gradients after its last one alone."""
    for rank in range(world_size):
        mine = batch.micro_batches(rank=rank, world_size=world_size)
        assert len(mine) == batch.accumulation_steps(world_size=world_size)
        assert [micro.is_last for micro in mine] == [False] * (len(mine) - 1) + [True]


@given(batch=batches, world_size=world_sizes)
def test_the_trainers_slots_are_the_same(batch, world_size):
    """There is one division of a step: that of the trainer's loader."""
    for rank in range(world_size):
        mine = slots(
            position=batch.position,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            world_size=world_size,
            rank=rank,
        )
        assert [(slot.position, slot.num_samples) for slot in mine] == [
            (micro.position, micro.num_samples) for micro in batch.micro_batches(rank=rank, world_size=world_size)
        ]


def gradient(batch, *, world_size):
    """The gradient as DDP makes it: each rank accumulates weighted means, then the ranks are averaged."""
    data = torch.arange(1.0, 41.0, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(world_size):
        w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        for micro in batch.micro_batches(rank=rank, world_size=world_size):
            x = data[[position % 40 for position in micro.positions]]
            (((w * x - 3) ** 2).mean() * micro.weight).backward()
        total += w.grad / world_size
    return total


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 12])
def test_uneven_ranks_compute_the_gradient_of_the_whole_step(world_size):
    """With 1 to 12 ranks the averaged gradient is that of the mean over the 11 samples of the step."""
    batch = ElasticBatch(global_batch_size=11, micro_batch_size=3, position=33)
    x = torch.arange(1.0, 41.0, dtype=torch.float64)[[position % 40 for position in range(33, 44)]]
    expected = (2 * (0.5 * x - 3) * x).mean()
    torch.testing.assert_close(gradient(batch, world_size=world_size), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [("global_batch_size", 0), ("micro_batch_size", True), ("position", -1), ("steps_done", 1.5)],
)
def test_a_field_out_of_range_is_refused(field, value):
    """What is no whole number in its range is named with its value, also in a state that was saved."""
    state = {"global_batch_size": 8, "micro_batch_size": 2, "position": 0, "steps_done": 0, field: value}
    with pytest.raises(ConfigError, match=f"{field} must be a whole number of at least [01], got {value}"):
        ElasticBatch.from_state_dict(state)


def test_a_wrong_state_or_rank_is_refused():
    """A state that lacks a number or has one too many, and a rank outside the world, are each refused."""
    batch = ElasticBatch(global_batch_size=8, micro_batch_size=2)
    with pytest.raises(ConfigError, match="got global_batch_size, micro_batch_size, position"):
        ElasticBatch.from_state_dict({"global_batch_size": 8, "micro_batch_size": 2, "position": 0})
    with pytest.raises(ConfigError, match="epoch"):
        ElasticBatch.from_state_dict({**batch.state_dict(), "epoch": 1})
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match=f"got rank {rank} of {world_size}"):
            batch.micro_batches(rank=rank, world_size=world_size)
