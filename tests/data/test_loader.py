"""The loader: the samples of each step, whatever the world, the workers, the batches before and the restarts."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from dptrain.data.loader import MicroBatchLoader
from dptrain.data.stream import SampleStream
from dptrain.errors import ConfigError, TaskError, TaskExitError

NUM_SAMPLES = 37
STREAM = SampleStream(NUM_SAMPLES, seed=3)

STEPS = [(8, 2), (8, 2), (24, 2), (16, 2), (16, 4), (32, 4), (13, 4), (13, 4), (3, 4), (16, 4)]
"""(global batch, micro-batch) of successive steps: full, grown, shrunk, another size, ragged, very few, full."""


class Numbers(Dataset):
    """Sample i is i; `reads` counts the samples read in all processes."""

    def __init__(self):
        self.reads = multiprocessing.Value("q", 0)

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
        return index


def windows(steps):
    position = 0
    for global_batch_size, micro_batch_size in steps:
        yield {
            "position": position,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
        }
        position += global_batch_size


def make_loader(*, rank=0, world_size=1, num_workers=0, dataset=None, **options):
    return MicroBatchLoader(
        dataset or Numbers(), stream=STREAM, rank=rank, world_size=world_size, num_workers=num_workers, **options
    )


def ledger(steps, *, world_size, num_workers):
    """The dataset indices of each step, in the order of their positions, from all ranks together."""
    seen = [{} for _ in steps]
    for rank in range(world_size):
        with make_loader(rank=rank, world_size=world_size, num_workers=num_workers) as loader:
            for step, window in zip(seen, windows(steps), strict=True):
                for micro_batch in loader.window(**window):
                    for offset in range(micro_batch.num_samples):
                        position = micro_batch.position + offset
                        assert position not in step
                        step[position] = micro_batch.batch[offset].item()
    return [[step[position] for position in sorted(step)] for step in seen]


def expected(steps):
    return [
        STREAM.indices(np.arange(window["position"], window["position"] + window["global_batch_size"])).tolist()
        for window in windows(steps)
    ]


def indices_of(loader, window):
    return [micro_batch.batch.tolist() for micro_batch in loader.window(**window)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_sees_the_streams_samples(world_size, num_workers):
    """Each step sees exactly its stretch of the stream, for any world and workers, through all changes of batch."""
    assert ledger(STEPS, world_size=world_size, num_workers=num_workers) == expected(STEPS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_may_move_at_random(num_workers):
    """No sample is lost or repeated when batch and micro-batch change at random steps."""
    moves = random.Random(1)
    steps = [(moves.choice([4, 8, 12, 17, 40]), moves.choice([1, 2, 3, 4])) for _ in range(25)]
    assert ledger(steps, world_size=2, num_workers=num_workers) == expected(steps)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restart_at_any_step_goes_on_the_same(num_workers):
    """A new loader at a step delivers the micro-batches that an uninterrupted one delivers."""
    options = {"rank": 1, "world_size": 2, "num_workers": num_workers}
    with make_loader(**options) as loader:
        uninterrupted = [indices_of(loader, window) for window in windows(STEPS)]
    for window, whole in zip(windows(STEPS), uninterrupted, strict=True):
        with make_loader(**options) as loader:
            assert indices_of(loader, window) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_may_be_repeated_or_dropped(num_workers):
    """A jump back, a jump ahead and a window left half way cost nothing but time."""
    first, second, third = windows([(8, 2)] * 3)
    with make_loader(num_workers=num_workers) as loader:
        whole = [indices_of(loader, window) for window in (first, second, third)]
        assert indices_of(loader, first) == whole[0]
        assert indices_of(loader, third) == whole[2]
        for half_way in (first, second):
            next(loader.window(**half_way))
            assert indices_of(loader, half_way) == whole[half_way["position"] // 8]


def test_interleaved_windows_are_an_error():
    """Two windows in turns would mix their samples; the loader says so."""
    first, second = windows([(8, 2)] * 2)
    with make_loader() as loader:
        one, other = loader.window(**first), loader.window(**second)
        next(one), next(other)
        with pytest.raises(RuntimeError, match="another window"):
            next(one)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_change_of_batch_wastes_no_prefetched_sample(world_size):
    """With full windows no more is read than was delivered and may still lie ready."""
    steps = [(8, 2), (16, 2), (24, 2), (4, 2), (8, 2)]
    dataset, num_workers, prefetch_factor = Numbers(), 2, 3
    with make_loader(
        dataset=dataset, world_size=world_size, num_workers=num_workers, prefetch_factor=prefetch_factor
    ) as loader:
        delivered = sum(len(indices) for window in windows(steps) for indices in indices_of(loader, window))
    assert delivered * world_size == sum(batch for batch, _ in steps)
    assert delivered <= dataset.reads.value <= delivered + num_workers * prefetch_factor * 2


def test_without_workers_nothing_is_read_ahead():
    """In one process, exactly what is delivered is read, also across changes of the micro-batch and ragged windows."""
    dataset = Numbers()
    with make_loader(dataset=dataset) as loader:
        for window in windows(STEPS):
            indices_of(loader, window)
    assert dataset.reads.value == sum(batch for batch, _ in STEPS)


def test_a_rank_without_a_sample_still_gets_a_batch():
    """Where the step has fewer samples than slots, the filler holds one sample and counts none."""
    window = {"position": 5, "global_batch_size": 2, "micro_batch_size": 1}
    counts = []
    for rank in range(4):
        with make_loader(rank=rank, world_size=4) as loader:
            (micro_batch,) = loader.window(**window)
        assert micro_batch.batch.shape == (1,)
        counts.append(micro_batch.num_samples)
    assert counts == [1, 1, 0, 0]


def global_states():
    numpys = np.random.get_state()  # noqa: NPY002 (the global generator is the one in question)
    return random.getstate(), numpys[1].tolist(), numpys[2:], torch.get_rng_state().tolist()


def test_the_callers_generators_are_left_alone():
    """Building a loader, starting, anchoring and ending its workers draws nothing from the global generators."""
    before = global_states()
    make_loader()
    with make_loader(num_workers=2) as loader:
        for window in windows(STEPS):
            indices_of(loader, window)
    assert global_states() == before


def test_workers_outlive_the_groups_signals_and_end_with_the_loader():
    """SIGINT and SIGTERM do not reach the fetching; closing leaves no process."""
    first, second = windows([(8, 2), (16, 2)])
    others = set(multiprocessing.active_children())
    with make_loader(num_workers=2, prefetch_factor=1) as loader:
        indices_of(loader, first)
        workers = set(multiprocessing.active_children()) - others
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.1)
        assert indices_of(loader, second) == np.reshape(expected([(8, 2), (16, 2)])[1], (8, 2)).tolist()
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)


def test_a_closed_loader_starts_again_when_it_is_read():
    """After close, a window starts new workers and goes on at its position."""
    first, second = windows([(8, 2)] * 2)
    loader = make_loader(num_workers=1)
    indices_of(loader, first)
    loader.close()
    assert [i for indices in indices_of(loader, second) for i in indices] == expected([(8, 2)] * 2)[1]
    loader.close()


def test_a_program_that_forgets_to_close_still_ends():
    """Python waits at exit for its children, and ours ignore its SIGTERM: the loader ends them itself."""
    program = (
        "from dptrain.data import MicroBatchLoader, SampleStream\n"
        "loader = MicroBatchLoader(range(10), stream=SampleStream(10, seed=0), rank=0, world_size=1, num_workers=2)\n"
        "print(sum(micro_batch.num_samples for micro_batch in"
        " loader.window(position=0, global_batch_size=10, micro_batch_size=5)))\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=240, check=True
    )
    assert ended.stdout == "10\n"
    assert ended.stderr == ""


class Damaged(Numbers):
    def __getitem__(self, index):
        if index == STREAM.indices(np.array([5])).item():
            raise ValueError("sample is damaged")
        return index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_an_error_of_its_own_window(num_workers):
    """The dataset's error reaches the caller, the next window is right, and the workers end as usual."""
    others = set(multiprocessing.active_children())
    first, second = windows([(8, 2)] * 2)
    with make_loader(dataset=Damaged(), num_workers=num_workers) as loader:
        with pytest.raises(ValueError, match="sample is damaged"):
            indices_of(loader, first)
        assert [i for indices in indices_of(loader, second) for i in indices] == expected([(8, 2)] * 2)[1]
    assert set(multiprocessing.active_children()) <= others


class Stuck(Numbers):
    def __getitem__(self, index):
        if index in STREAM.indices(np.arange(2, 8)):
            time.sleep(1000)
        return index


def test_a_worker_that_is_stuck_in_a_sample_is_ended(monkeypatch):
    """Closing waits a while for a sample that never comes, and then leaves no process behind."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    others = set(multiprocessing.active_children())
    with make_loader(dataset=Stuck(), num_workers=2) as loader:
        next(loader.window(position=0, global_batch_size=8, micro_batch_size=2))
        workers = set(multiprocessing.active_children()) - others
        assert len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)


def test_the_users_collate_is_used():
    """Samples become a batch by the collate that was given, in the process that reads them."""
    with make_loader(collate=lambda samples: (os.getpid(), sorted(samples)), num_workers=1) as loader:
        (micro_batch,) = loader.window(position=0, global_batch_size=4, micro_batch_size=4)
    process, samples = micro_batch.batch
    assert process != os.getpid()
    assert samples == sorted(expected([(4, 4)])[0])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())

    def __len__(self):
        return NUM_SAMPLES


class WithoutLength(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("dataset", [Endless(), WithoutLength()])
def test_datasets_without_positions_are_refused(dataset):
    """An iterable dataset, or one without a length, is named and the remedy with it."""
    with pytest.raises(TaskError, match=f"{type(dataset).__name__} cannot be read by position.*__len__"):
        make_loader(dataset=dataset)


def test_a_stream_of_another_length_is_refused():
    """The order must be that of this dataset."""
    with pytest.raises(ConfigError, match="37 samples, but the dataset has 5"):
        make_loader(dataset=range(5))


@pytest.mark.parametrize("options", [{"num_workers": -1}, {"prefetch_factor": 0}])
def test_impossible_counts_are_refused(options):
    """Workers and prefetching have least values, which the error names."""
    with pytest.raises(ConfigError, match="at least"):
        make_loader(**options)


class Exits(Numbers):
    """Ends its process at the fifth sample: by the interpreter, or without it."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def __getitem__(self, index):
        number = super().__getitem__(index)
        if self.reads.value > 4:
            self.end(0)
        return torch.ones(1000) * number


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_that_exits_is_named(num_workers):
    """`sys.exit()` in a sample is an error that says so, in this process and in one that loads samples."""
    with (
        make_loader(num_workers=num_workers, dataset=Exits(sys.exit)) as loader,
        pytest.raises(TaskExitError, match=r"sys\.exit\(0\)"),
    ):
        indices_of(loader, {"position": 0, "global_batch_size": 16, "micro_batch_size": 2})


def test_a_loading_process_that_vanished_is_named():
    """What it had handed over is gone with it; the error is of the process, not of a socket."""
    with (
        make_loader(num_workers=1, dataset=Exits(os._exit)) as loader,
        pytest.raises(RuntimeError, match="exited unexpectedly"),
    ):
        indices_of(loader, {"position": 0, "global_batch_size": 16, "micro_batch_size": 2})


def test_data_that_cannot_be_pickled_are_refused_with_the_way_out(monkeypatch):
    """One sentence, where loading processes are not forked (Python 3.14) and the data must be sent to them."""
    error = AttributeError("Can't pickle local object 'build.<locals>.<lambda>'")
    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", mock.Mock(side_effect=error))
    with make_loader(num_workers=1) as loader, pytest.raises(TaskError, match=r"cannot be sent.*--num-workers 0"):
        next(loader.window(position=0, global_batch_size=8, micro_batch_size=2))
