"""Fetches the micro-batches of one replica, ahead of time where there are workers; their order is decided elsewhere."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dptrain.data.source import Batch, PlannedSlot, Sample, SlotSource
from dptrain.data.stream import SampleStream
from dptrain.data.window import Slot, is_full, slots
from dptrain.errors import ConfigError, TaskError


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one replica does in one forward–backward.

    Attributes:
        batch: the collated samples.
        num_samples: how many samples of the step it holds. 0 marks a filler: the step has fewer samples than slots, and
            `batch` holds what a model needs at least, from beyond the step, so that this replica too has a
            forward–backward to synchronise with; its loss must be weighted with zero.
        position: of its first sample in the stream.
    """

    batch: Batch
    num_samples: int
    position: int


class MicroBatchLoader:
    """Delivers one replica's micro-batches, window by window, from one endless prefetching iterator.

    A change of the batch costs nothing: as long as windows are full and follow each other, micro-batch number j after
    the anchor belongs to rank j mod `world_size`, whatever the batches are, so what the workers have prefetched stays
    right. The iterator is anchored anew, and what it prefetched dropped, only after a jump in position, at a new
    micro-batch size, or at a new batch that `micro_batch_size` × `world_size` does not divide.

    Randomness in the dataset (torch's CPU generator, `random`, and numpy's global generator) depends on (seed,
    position) alone: not on world size, workers, micro-batch or restarts. A dataset that keeps a generator of its own is
    outside this promise, and so is one whose samples change when they are read twice. Neither building nor iterating
    the loader draws from the caller's generators; without workers, though, a fetch seeds them, so seed them after it.

    Workers ignore SIGINT and SIGTERM: these reach the whole process group, and the replica needs its workers to finish
    its step. `close` ends them, as do the context manager and the end of the program.

    Args:
        dataset: map-style, with a length; `__getitems__` is used where it exists and draws no random numbers.
        stream: the order of its samples.
        rank: this replica.
        world_size: number of replicas.
        num_workers: processes that fetch; 0 fetches in this process.
        prefetch_factor: micro-batches that each worker fetches ahead.
        collate: samples → micro-batch, or None for torch's default. It runs where the samples are fetched.
        pin_memory: copy tensors to page-locked memory, for a faster transfer to a GPU.
        filler_size: samples in a filler.

    Raises:
        TaskError: where the dataset is iterable-style or has no length.
        ConfigError: where the stream was made for another length, or a count is out of range.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        stream: SampleStream,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        collate: Callable[[list[Sample]], Batch] | None = None,
        pin_memory: bool = False,
        filler_size: int = 1,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TaskError(
                f"{type(dataset).__name__} cannot be read by position: "
                "give a map-style dataset, with __getitem__ and __len__"
            )
        if len(dataset) != stream.num_samples:
            raise ConfigError(f"the stream orders {stream.num_samples} samples, but the dataset has {len(dataset)}")
        if num_workers < 0 or prefetch_factor < 1:
            raise ConfigError(
                f"num_workers must be at least 0 and prefetch_factor at least 1, "
                f"got {num_workers} and {prefetch_factor}"
            )
        self._source = SlotSource(dataset, stream=stream, collate=collate or default_collate, filler_size=filler_size)
        self._plan = _EndlessSlots(rank=rank, world_size=world_size, reads_ahead=num_workers > 0)
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._pin_memory = pin_memory
        self._dataloader: DataLoader[Any] | None = None
        self._feed: Any = None  # iterator over (position, batch)
        self._next_position: int | None = None  # where the feed stands, if it stands between two windows

    def window(self, *, position: int, global_batch_size: int, micro_batch_size: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the optimizer step that begins at `position`, in order.

        Finish or drop one window before the next is begun.

        Raises:
            ConfigError: where a size is below 1.
        """
        plan = self._plan
        wanted = slots(
            position=position,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            world_size=plan.world_size,
            rank=plan.rank,
        )
        if position != self._next_position or not plan.covers(
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        ):
            plan.position = position
            plan.global_batch_size = global_batch_size
            plan.micro_batch_size = micro_batch_size
            plan.keep_from = position
            self._anchor()
        self._next_position = None  # a window that is dropped half way leaves the feed between two slots
        for micro in wanted:
            fetched_position, samples = self._fetched()
            plan.keep_from = fetched_position  # no later window begins before it
            if fetched_position != micro.position:
                raise RuntimeError(
                    f"position {micro.position} was due but {fetched_position} came: another window of this loader was "
                    f"begun before this one ended"
                )
            if micro is wanted[-1]:
                self._next_position = position + global_batch_size
            yield MicroBatch(batch=samples, num_samples=micro.num_samples, position=micro.position)

    def _fetched(self) -> tuple[int, Batch]:
        feed = self._feed
        try:
            fetched: tuple[int, Batch] = next(feed)
        except (FileNotFoundError, ConnectionError, EOFError) as error:
            # A worker hands its tensors over through a socket, which is gone with it: torch names the socket alone.
            ended = [worker for worker in getattr(feed, "_workers", ()) if _has_ended(worker)]
            if not ended:
                raise
            pids = ", ".join(str(worker.pid) for worker in ended)
            raise RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly") from error
        return fetched

    def close(self) -> None:
        """End the workers; a later window would start new ones."""
        feed, self._feed, self._dataloader, self._next_position = self._feed, None, None, None
        if feed is not None and self._num_workers > 0:
            # Dropping the last reference would do, but the traceback of a sample that failed may hold another one.
            feed._shutdown_workers()  # noqa: SLF001 (torch has no public call for it)
            for worker in feed._workers:  # noqa: SLF001 (nor for this)
                worker.kill()  # stuck in a sample: torch gave up after a SIGTERM, which it ignores
                worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _anchor(self) -> None:
        """Let the feed begin at the plan's position; workers that run keep running."""
        if self._num_workers == 0 and not self._pin_memory:
            # Nothing is left for torch's loader to do, and its way to the source takes longer than a small batch.
            self._feed = map(self._source.__getitem__, self._plan)
            return
        if self._dataloader is None:
            self._dataloader = DataLoader(
                self._source,
                batch_size=None,  # the source collates: it alone knows where a sample's randomness ends
                sampler=self._plan,
                collate_fn=_unchanged,
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch_factor if self._num_workers > 0 else None,
                persistent_workers=self._num_workers > 0,
                pin_memory=self._pin_memory,
                worker_init_fn=_outlive_signals_to_the_group,
                generator=torch.Generator(),  # torch draws a base seed, by default from the global generator
            )
            # At exit Python sends its children a SIGTERM, which ours ignore, and waits for them for ever.
            atexit.register(_close_if_alive, weakref.ref(self))
        try:
            self._feed = iter(self._dataloader)
        except OSError as error:
            raise ConfigError(
                f"cannot start {self._num_workers} processes that load samples: {error.strerror or error}; lower "
                "num_workers, or raise the limits of this user (ulimit -u, ulimit -n)"
            ) from error
        except Exception as error:
            if not isinstance(error, (AttributeError, TypeError)) and type(error).__name__ != "PicklingError":
                raise
            raise TaskError(
                f"the training data cannot be sent to the {self._num_workers} processes that load samples "
                f"({type(error).__name__}: {error}): leave out what cannot be pickled, such as lambdas and open files, "
                "or give --num-workers 0"
            ) from error


@dataclass(kw_only=True)
class _EndlessSlots:
    """One rank's slots from an anchor on, as if the batch never changed again; torch reads them as a sampler."""

    rank: int
    world_size: int
    reads_ahead: bool
    position: int = 0
    global_batch_size: int = 1
    micro_batch_size: int = 1
    keep_from: int = 0  # of the latest micro-batch that was delivered

    def __iter__(self) -> Iterator[Slot]:
        position = self.position
        while True:
            window = slots(
                position=position,
                global_batch_size=self.global_batch_size,
                micro_batch_size=self.micro_batch_size,
                world_size=self.world_size,
                rank=self.rank,
            )
            for slot in window:
                yield self._planned(slot)
            position += self.global_batch_size

    def _planned(self, slot: Slot) -> Slot:
        # A filler's samples lie beyond its step: they are asked for again even where nothing is read ahead.
        if not self.reads_ahead and slot.num_samples:
            return slot
        return PlannedSlot(
            micro_step=slot.micro_step,
            rank=slot.rank,
            position=slot.position,
            num_samples=slot.num_samples,
            keep_from=min(self.keep_from, slot.position),
        )

    def covers(self, *, global_batch_size: int, micro_batch_size: int) -> bool:
        """Whether a window of this shape, at a position where one of the plan's begins, has the plan's slots."""
        return micro_batch_size == self.micro_batch_size and (
            global_batch_size == self.global_batch_size
            or all(
                is_full(global_batch_size=size, micro_batch_size=micro_batch_size, world_size=self.world_size)
                for size in (global_batch_size, self.global_batch_size)
            )
        )


def _unchanged(batch: Batch) -> Batch:
    return batch


def _outlive_signals_to_the_group(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _close_if_alive(reference: weakref.ref[MicroBatchLoader]) -> None:
    if (loader := reference()) is not None:
        loader.close()


def _has_ended(worker: Any) -> bool:  # noqa: ANN401 - a process of torch's
    worker.join(timeout=1.0)  # the socket is closed a moment before the process is gone
    return not worker.is_alive()
