"""Reads the samples of one slot, their randomness tied to (seed, position); when and where is decided elsewhere."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, TensorDataset, default_collate

from dptrain.data.iterable import StreamedSamples
from dptrain.data.stream import SampleStream
from dptrain.data.window import Slot
from dptrain.errors import TaskExitError

Sample = Any
"""What the dataset returns for one index."""

Batch = Any
"""What `collate` makes of a list of samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSlot(Slot):
    """A slot some of whose samples may be asked for again in another one.

    Attributes:
        keep_from: the position from which on samples may be asked for again. It is the end of any other slot.
    """

    keep_from: int


class SlotSource(Dataset[tuple[int, Batch]]):
    """The user's dataset, read by slot: (position, collated samples), with randomness tied to the position.

    Seeding three generators for each sample costs more than reading a small sample does (17 µs against 6 µs for a digit
    of 64 numbers, on one CPU core). Most datasets draw nothing, so a micro-batch is first read from one fixed seed; if
    afterwards the generators give what they give right after that seed, no sample drew, and each is what its own seed
    would have made it. Otherwise it is read again sample by sample, each from its own seed, and so is all that follows.

    A dataset with a method `read_batch` (array of indices → collated micro-batch) is read by it alone, where torch's
    own collation would follow: it promises to draw nothing, and saves the samples' way through Python one by one.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        stream: SampleStream,
        collate: Callable[[list[Sample]], Batch],
        filler_size: int = 1,
    ) -> None:
        self._dataset = dataset
        self._stream = stream
        self._collate = collate
        self._filler_size = filler_size
        self._draws_random_numbers = False
        # Only beside torch's own collation: what another one makes of samples is not known here.
        self._read_batch = _reader(dataset) if collate is default_collate else None

    def __getitem__(self, slot: Slot) -> tuple[int, Batch]:
        num_samples = slot.num_samples or self._filler_size
        numbers = self._stream.window(slot.position, num_samples)
        end = slot.position + num_samples
        stream = self._dataset if isinstance(self._dataset, StreamedSamples) else None
        if stream is not None and isinstance(slot, PlannedSlot):
            stream.keep_from(slot.keep_from, until=end)
        try:
            batch = self._collated(numbers, first=slot.position)
        except SystemExit as error:
            # A process that loads samples would end without a word, and torch could only say that it did.
            raise TaskExitError(f"the task called sys.exit({error.code!r}) before the run was done") from error
        if stream is not None and not isinstance(slot, PlannedSlot):
            stream.keep_from(end, until=end)
        return slot.position, batch

    def micro_batch(self, positions: NDArray[np.int64]) -> Batch:
        """Return the samples at some positions, collated."""
        return self._collated(self._stream.indices(positions), first=int(positions[0]))

    def _collated(self, numbers: NDArray[np.int64], *, first: int) -> Batch:
        if self._read_batch is not None:
            return self._read_batch(numbers)
        indices = numbers.tolist()
        samples = self._read(indices, first_position=first)
        if self._collate is not default_collate:  # which draws nothing
            # What another collate draws is a matter of the whole micro-batch, so of its first position.
            seed_generators(_derived_seed(self._stream.seed, first, purpose="collate"))
        try:
            return self._collate(samples)
        except Exception as error:
            _note(error, "making a micro-batch of", indices)
            raise

    def _read(self, indices: list[int], *, first_position: int) -> list[Sample]:
        if not self._draws_random_numbers:
            untouched = _draws_after_seed(_PROBE_SEED)
            seed_generators(_PROBE_SEED)
            samples = self._read_together(indices)
            if _draws() == untouched:
                return samples
            self._draws_random_numbers = True
            if isinstance(self._dataset, StreamedSamples):
                self._dataset.forget()  # what was made from the fixed seed
        return [self._read_seeded(index, position) for position, index in enumerate(indices, first_position)]

    def _read_together(self, indices: list[int]) -> list[Sample]:
        if hasattr(self._dataset, "__getitems__"):
            try:
                return list(self._dataset.__getitems__(indices))
            except Exception as error:
                _note(error, "reading", indices)
                raise
        return [self._read_one(index) for index in indices]

    def _read_one(self, index: int) -> Sample:
        try:
            return self._dataset[index]
        except Exception as error:
            _note(error, "reading", [index])
            raise

    def _read_seeded(self, index: int, position: int) -> Sample:
        seed_generators(_derived_seed(self._stream.seed, position, purpose="sample"))
        return self._read_one(index)


def _reader(dataset: Dataset[Any]) -> Callable[[NDArray[np.int64]], Batch] | None:
    """Return what reads a micro-batch of the dataset at once, if there is such a thing."""
    if type(dataset) is TensorDataset:  # a subclass may do something of its own
        # What collating the rows would give, without the way of each through Python: 6 µs a digit of 64 numbers.
        return functools.partial(_rows, dataset.tensors)
    reader: Callable[[NDArray[np.int64]], Batch] | None = getattr(dataset, "read_batch", None)
    return reader


def _rows(tensors: tuple[torch.Tensor, ...], indices: NDArray[np.int64]) -> Batch:
    chosen = torch.tensor(indices)
    return [tensor.index_select(0, chosen) for tensor in tensors]


def _note(error: Exception, doing: str, indices: list[int]) -> None:
    """Add to an error which samples it is about. A note is part of its traceback, and so it gets out of a worker."""
    more = f" and {len(indices) - _MAX_NAMED} more" if len(indices) > _MAX_NAMED else ""
    samples = "sample" if len(indices) == 1 else "samples"
    error.add_note(f"while {doing} {samples} {', '.join(map(str, indices[:_MAX_NAMED]))}{more} of the data set")


_MAX_NAMED = 8
_PROBE_SEED = 0


def _derived_seed(seed: int, position: int, *, purpose: str) -> int:
    digest = hashlib.blake2b(f"dptrain {purpose} {seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def seed_everything(seed: int) -> None:
    """Seed the generators of all devices as well, before a task is built."""
    torch.manual_seed(seed)
    seed_generators(seed)


def seed_generators(seed: int) -> None:
    """Seed the global generators that data sets and tasks draw from on the CPU: torch's, numpy's and Python's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (datasets draw from the global generator, so that one it is)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every device as well: 200 times the cost


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators that data sets and tasks draw from on the CPU as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002 - the global one
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - as above
        torch.default_generator.set_state(states[2])


def state_beside_torch() -> object:
    """Return the states of numpy's and of Python's global generators; equal where none was drawn from."""
    state: Any = np.random.get_state()  # noqa: NPY002 - the global one
    return random.getstate(), state[1].tobytes(), *state[2:]


def _draws() -> tuple[float, float, float]:
    """The next number of each generator."""
    return (
        random.random(),  # noqa: S311 (a probe, no secret)
        np.random.random_sample(),  # noqa: NPY002 (as above)
        torch.rand((), dtype=torch.float64, device="cpu").item(),
    )


@functools.cache
def _draws_after_seed(seed: int) -> tuple[float, float, float]:
    seed_generators(seed)
    return _draws()
