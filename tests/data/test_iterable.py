"""Iterable data read by position: the n-th sample is the n-th, however it is come to, pass after pass."""

from __future__ import annotations

import multiprocessing
import pickle
from dataclasses import replace

import pytest
from torch.utils.data import IterableDataset

from dptrain.data.iterable import StreamedSamples
from dptrain.data.loader import MicroBatchLoader
from dptrain.data.stream import SampleStream
from dptrain.errors import TaskError
from tests.runs import Killed, Noisy, attempt, make_config, noisy, result_of


class Counted(IterableDataset):
    """Yields 0 … length-1 and counts how many it had to."""

    def __init__(self, length):
        self.length = length
        self.num_read = 0

    def __iter__(self):
        for number in range(self.length):
            self.num_read += 1
            yield number


class Seekable(Counted):
    """Can begin anywhere."""

    def from_position(self, position):
        for number in range(position, self.length):
            self.num_read += 1
            yield number


@pytest.mark.parametrize("kind", [Counted, Seekable])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 5, 6], [5, 3, 4, 0], [6, 7, 8, 20, 21], [13, 2, 30]])
def test_the_sample_at_a_position_is_that_of_the_pass(kind, order):
    """Forwards, with gaps, backwards and over the end: index n gives sample n modulo the length."""
    samples = StreamedSamples(kind(7))
    assert [samples[index] for index in order] == [index % 7 for index in order]


def test_reading_on_reads_each_sample_once_and_a_jump_passes_over():
    """In order nothing is read twice; without `from_position` a gap costs its samples, with it nothing."""
    plain, seekable = Counted(100), Seekable(100)
    for source in (plain, seekable):
        samples = StreamedSamples(source)
        for index in (*range(10), *range(50, 60)):
            assert samples[index] == index
    assert (plain.num_read, seekable.num_read) == (60, 20)


def test_a_copy_for_a_loading_process_begins_anew():
    """An iterator cannot be sent; the copy finds its place by itself."""
    samples = StreamedSamples(Counted(9))
    assert samples[4] == 4
    assert pickle.loads(pickle.dumps(samples))[5] == 5  # noqa: S301 - made here


class Begun(IterableDataset):
    """Yields [0], [1] … [length-1]; `times` counts in all processes how often it was begun."""

    def __init__(self, length):
        self.length = length
        self.times = multiprocessing.Value("q", 0)

    def __iter__(self):
        self.times.value += 1
        for number in range(self.length):
            yield [number]


def emptied(samples):
    """Collate and change the samples, as collate functions do that pop the labels."""
    return [sample.pop() for sample in samples]


STEPS = [*[(8, 4)] * 20, (16, 8), (8, 4), (3, 4), (5, 4), *[(32, 8)] * 3, *[(6, 2)] * 3, (1, 2), (1, 2), (8, 4)]
"""(global batch, micro-batch): the micro-batch grows and shrinks, and some steps have fillers."""


@pytest.mark.parametrize(("num_workers", "rank"), [(0, 0), (0, 1), (1, 0), (2, 1)])
@pytest.mark.parametrize("length", [10_000, 50])
def test_a_change_of_the_micro_batch_reads_on_where_it_is(num_workers, rank, length):
    """What was read ahead and dropped is not read from the stream's beginning again, also where samples are changed."""
    source = Begun(length)
    samples = StreamedSamples(source)
    stream = SampleStream(len(samples), seed=0, shuffle=False)
    loader = MicroBatchLoader(
        samples, stream=stream, rank=rank, world_size=2, num_workers=num_workers, collate=emptied, filler_size=4
    )
    position = 0
    with loader:
        for size, micro in STEPS:
            window = loader.window(position=position, global_batch_size=size, micro_batch_size=micro)
            for micro_batch in window:
                first = micro_batch.position
                wanted = [number % length for number in range(first, first + (micro_batch.num_samples or 4))]
                assert micro_batch.batch == wanted
            position += size
    furthest = position + (num_workers * 2 + 1) * 2 * 8  # two micro-batches of 8 ahead by each process, of 2 replicas
    assert source.times.value <= max(1, num_workers) * -(-furthest // length)


def test_what_is_kept_is_bounded_and_a_long_way_back_reads_again():
    """A jump to where nothing is kept from keeps no more than what may be asked for again."""
    samples = StreamedSamples(Counted(10_000))
    for position in (*range(0, 5_000, 8), 2_000):
        samples.keep_from(max(0, position - 16), until=position + 8)
        assert [samples[at] for at in range(position, position + 8)] == list(range(position, position + 8))
        assert len(samples._kept) <= 24


def test_an_empty_iterable_is_refused():
    """It would be begun for ever."""
    with pytest.raises(TaskError, match="Counted yields no samples"):
        StreamedSamples(Counted(0))[0]


class NoisyStream(IterableDataset):
    """The samples of another task, one after the other."""

    def __iter__(self):
        data = Noisy()
        yield from (data[index] for index in range(len(data)))


def streamed():
    """Build a task on a stream."""
    return replace(noisy(), train_data=NoisyStream())


def test_a_run_on_a_stream_is_killed_and_ends_in_the_same_bytes(tmp_path):
    """Straight or with a death in step 20, over more than two passes: parameters, decisions and rows are the same."""
    results = []
    for name, deaths in (("straight", []), ("killed", [20])):
        for death in [*deaths, None]:
            try:
                attempt(tmp_path / name, kill_at=death, config=make_config(tmp_path / name), task=streamed)
            except Killed:
                assert death is not None
        results.append(result_of(tmp_path / name))
    assert results[0] == results[1]
    assert results[0]["summary"]["samples_seen"] == 230
