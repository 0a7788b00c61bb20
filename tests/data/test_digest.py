"""Digests of data: the same for the same samples after the same collation, another for any other."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from dptrain.data import SampleStream
from dptrain.data.digest import DataDigest


class Augmented(Dataset):
    """Samples with noise from the global generators, in a mapping with a text."""

    def __init__(self, *, length=20, changed=()):
        self.features = torch.arange(length, dtype=torch.float32)
        for index in changed:
            self.features[index] += 1

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return {"x": self.features[index] + torch.rand(()) + random.random(), "name": f"sample {index}"}


def digest_of(data, *, collate=None, seed=0):
    return DataDigest(data, stream=SampleStream(len(data), seed=seed), collate=collate)


def test_the_digest_is_that_of_the_samples():
    """It does not depend on random numbers drawn before or in the samples; it does on length, values and dtype."""
    first = digest_of(Augmented()).whole()
    torch.rand(5)
    assert digest_of(Augmented()).whole() == first
    assert digest_of(Augmented(length=21)).whole() != first
    assert digest_of(Augmented(changed=[19])).whole() != first
    one, other = (TensorDataset(torch.zeros(9, dtype=dtype)) for dtype in (torch.float32, torch.int32))
    assert digest_of(one).whole() != digest_of(other).whole()


@pytest.mark.parametrize("seed", range(5))
def test_a_change_of_one_sample_in_ten_is_found(seed):
    """At random places, in 1,000 samples, whatever the seed: 40 places are looked at."""
    changed = random.Random(seed).sample(range(1000), 100)
    assert digest_of(Augmented(length=1000)).whole() != digest_of(Augmented(length=1000, changed=changed)).whole()


def test_what_collate_makes_of_the_samples_counts():
    """The same samples, with the numbers of words exchanged: a vocabulary that was built in another order."""

    def with_vocabulary(numbers):
        def collate(samples):
            return torch.tensor(
                [[numbers[letter] for letter in sample["name"] if letter in numbers] for sample in samples]
            )

        return collate

    one, other = with_vocabulary({"s": 0, "a": 1}), with_vocabulary({"a": 0, "s": 1})
    assert digest_of(Augmented(), collate=one).whole() == digest_of(Augmented(), collate=one).whole()
    assert digest_of(Augmented(), collate=one).whole() != digest_of(Augmented(), collate=other).whole()


def test_the_samples_trained_last_are_distinguished_from_others():
    """Eight before a position; those that come after it do not count."""
    stream = SampleStream(1000, seed=0)
    position = 400
    trained = stream.indices(torch.arange(position - 8, position).numpy()).tolist()
    later = stream.indices(torch.arange(position, position + 8).numpy()).tolist()
    first = digest_of(Augmented(length=1000)).recent(position)
    assert digest_of(Augmented(length=1000, changed=later)).recent(position) == first
    assert digest_of(Augmented(length=1000, changed=trained[:1])).recent(position) != first
    assert digest_of(Augmented(length=1000)).recent(0) == ""


def test_a_handful_of_samples_is_read():
    """Up to 40 and one micro-batch twice, however long the data set is."""
    read = []

    class Long(Dataset):
        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            read.append(index)
            return index

    digest_of(Long()).whole()
    assert 30 < len(set(read)) <= 40
    assert (min(read), max(read)) == (0, 10**12 - 1)


def test_samples_that_are_never_the_same_have_no_digest():
    """A generator of the data set's own: nothing can be compared, and nothing is refused for it."""

    class Own(Dataset):
        def __init__(self):
            self.generator = torch.Generator()

        def __len__(self):
            return 9

        def __getitem__(self, index):
            return torch.rand((), generator=self.generator)

    one = digest_of(Own())
    assert not one.reproducible
    assert (one.whole(), one.recent(4)) == (digest_of(Own()).whole(), "")


def test_a_sample_that_cannot_be_read_is_left_to_training():
    """Which says where it stands; it is part of the digest by its kind."""

    class Poisoned(Augmented):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("unreadable")
            return super().__getitem__(index)

    assert digest_of(Poisoned()).whole() == digest_of(Poisoned()).whole() != digest_of(Augmented()).whole()


def test_the_generators_of_the_caller_stay_as_they_were():
    """A checkpoint asks in the midst of training."""
    torch.manual_seed(3)
    random.seed(3)
    digest = digest_of(Augmented(), collate=default_collate)
    digest.whole()
    digest.recent(5)
    found = (torch.rand(()).item(), random.random())
    torch.manual_seed(3)
    random.seed(3)
    assert found == (torch.rand(()).item(), random.random())
