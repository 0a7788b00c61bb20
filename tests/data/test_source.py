"""Reading a slot: what a sample draws depends on (seed, position) alone, and samples that draw nothing cost little."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dptrain.data.loader import MicroBatchLoader
from dptrain.data.source import SlotSource
from dptrain.data.stream import SampleStream
from dptrain.data.window import Slot

NUM_SAMPLES = 21


def draw():
    """One number of each global generator, the ones that datasets draw from."""
    return random.random(), np.random.normal(), torch.randn(()).item()  # noqa: NPY002 (these are under test)


class Augmented(Dataset):
    """(index, one draw of each generator) for the chosen indices, (index, zeros) for the others."""

    def __init__(self, augments=lambda _index: True):
        self.augments = augments

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        if not self.augments(index):
            return index, 0.0, 0.0, 0.0
        return index, *draw()


class AugmentedTogether(Augmented):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def values(dataset, *, position=0, seed=4, world_size=1, micro_batch_size=6, num_workers=0):
    """What each of 48 positions from `position` on holds, by position, all ranks together."""
    found = {}
    for rank in range(world_size):
        with MicroBatchLoader(
            dataset,
            stream=SampleStream(NUM_SAMPLES, seed=seed),
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            collate=list,
        ) as loader:
            for micro_batch in loader.window(
                position=position, global_batch_size=48, micro_batch_size=micro_batch_size
            ):
                found |= dict(enumerate(micro_batch.batch, micro_batch.position))
    return found


@pytest.mark.parametrize(
    "dataset",
    [Augmented(), AugmentedTogether(), Augmented(lambda index: index == 7), AugmentedTogether(lambda index: index < 3)],
    ids=["every sample", "every sample, read together", "one sample", "a few, read together"],
)
@pytest.mark.parametrize(
    "layout",
    [{"micro_batch_size": 1}, {"world_size": 2, "micro_batch_size": 4}, {"num_workers": 2, "micro_batch_size": 3}],
    ids=["one by one", "two replicas", "two workers"],
)
def test_draws_depend_on_the_position_alone(dataset, layout):
    """Augmentation is the same for any micro-batch, world and workers, also where few samples draw at all."""
    assert values(dataset, **layout) == values(dataset)


def test_draws_survive_a_restart():
    """A loader that begins later, in another state of the global generators, gives the same values."""
    whole = values(Augmented())
    random.seed(99)
    torch.manual_seed(99)
    rest = values(Augmented(), position=29)
    assert {position: rest[position] for position in range(29, 48)} == {
        position: whole[position] for position in range(29, 48)
    }


def test_draws_differ_between_positions_and_seeds():
    """No two positions share their random numbers, not even two visits to one sample; nor do two seeds."""
    drawn = [draws for _index, *draws in values(Augmented()).values()]
    drawn += [draws for _index, *draws in values(Augmented(), seed=5).values()]
    for one_generator in zip(*drawn, strict=True):
        assert len(set(one_generator)) == len(drawn)


class Counted(Dataset):
    def __init__(self):
        self.calls = []

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        raise AssertionError

    def __getitems__(self, indices):
        self.calls.append(list(indices))
        return indices


def test_samples_that_draw_nothing_are_read_together_and_once():
    """A dataset's __getitems__ gets the whole micro-batch, once, and never its single items."""
    dataset = Counted()
    source = SlotSource(dataset, stream=SampleStream(NUM_SAMPLES, seed=0, shuffle=False), collate=list)
    for position in (0, 4):
        assert source[Slot(micro_step=0, rank=0, position=position, num_samples=4)][0] == position
    assert dataset.calls == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("dataset", [Augmented(), Augmented(lambda _index: False)], ids=["augmented", "plain"])
def test_a_collate_that_draws_depends_on_the_position_alone(dataset):
    """What a collate draws differs from slot to slot, and is the same at the first read and later ones."""
    source = SlotSource(dataset, stream=SampleStream(NUM_SAMPLES, seed=0), collate=lambda _samples: draw())
    slot, other = (Slot(micro_step=0, rank=0, position=position, num_samples=4) for position in (8, 12))
    reads = [source[one][1] for one in (slot, other, slot)]
    assert reads[0] == reads[2]
    assert reads[0] != reads[1]
