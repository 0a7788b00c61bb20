"""Iterable data sets read by position: what lies between is passed over, so that a run can go on where it was."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from dptrain.errors import TaskError

ENDLESS = 2**62
"""The length that stands for one that is not known; a permutation has no more items."""
_NUM_PROBES = 8


class StreamedSamples(Dataset[Any]):
    """An `IterableDataset` whose n-th sample is the sample at position n of the run; at its end it begins again.

    Exact where the iterable yields the same samples in the same order each time it is begun, in every process: then
    the samples of a step depend neither on replicas and loading processes nor on restarts. A replica reads all samples
    and keeps its own, so reading costs as much on each as on one; and a run that goes on at position p first passes
    over p samples. An iterable with a method `from_position(p)`, which returns an iterator that begins with sample p
    (of none beyond the end), saves both. A loading process keeps
    what it has read ahead, (prefetch_factor × num_workers + 2) micro-batches of every replica at most, for a change of
    the micro-batch to read nothing again. Augmentation that draws random numbers while it iterates depends on who
    reads, and is not exact.

    Args:
        source: the iterable.
    """

    probes = range(_NUM_PROBES)
    """Samples that tell this data set from another one; a later one would have to be read up to."""

    def __init__(self, source: IterableDataset[Any]) -> None:
        self._source = source
        self._iterator: Iterator[Any] | None = None
        self._first = 0  # of those that the iterator has given
        self._next = 0
        self._length: int | None = None
        self._kept: deque[Any] = deque(maxlen=0)  # the last samples that were read, without a gap
        self._kept_end = 0  # the position in the run behind the last of them

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - whatever the iterable yields
        behind = self._kept_end - index
        if 0 < behind <= len(self._kept):
            return self._own(self._kept[-behind])
        wanted = index if self._length is None else index % self._length
        if self._iterator is None or index < self._kept_end or self._can_jump(wanted):
            self._begin(wanted)
        is_in_next_pass = wanted < self._next
        while True:
            try:
                sample = next(self._iterator)  # type: ignore[arg-type] # it was begun
            except StopIteration:
                wanted, is_in_next_pass = self._begin_again(wanted), False
                continue
            self._next += 1
            self._kept.append(sample)
            if self._next > wanted and not is_in_next_pass:
                self._kept_end = index + 1
                return self._own(sample)

    def keep_from(self, position: int, *, until: int) -> None:
        """Keep the samples from `position` on, while those before `until` are read: they may be asked for again.

        A loader that changes the micro-batch drops what it has read ahead, and asks for it again in other pieces. Each
        such step back would read the iterable from its beginning otherwise.
        """
        is_kept = self._kept_end - len(self._kept) <= position
        num_kept = max(0, (max(until, self._kept_end) if is_kept else until) - position)
        if num_kept != self._kept.maxlen:
            self._kept = deque(self._kept, maxlen=num_kept)

    def forget(self) -> None:
        """Read again what is asked for again."""
        self._kept.clear()

    def _own(self, sample: Any) -> Any:  # noqa: ANN401 - as above
        """Return a sample that its reader may change, as collate functions do that pop the labels."""
        if not self._kept.maxlen:
            return sample
        try:
            return copy.deepcopy(sample)
        except Exception:  # noqa: BLE001 - whatever a sample raises that cannot be copied: it is read again if need be
            self._kept.clear()
            return sample

    def _can_jump(self, wanted: int) -> bool:
        return wanted != self._next and hasattr(self._source, "from_position")

    def _begin(self, position: int) -> None:
        if position and hasattr(self._source, "from_position"):
            self._iterator, self._first = iter(self._source.from_position(position)), position
        else:
            self._iterator, self._first = iter(self._source), 0
        self._next = self._first
        self._kept.clear()

    def _begin_again(self, wanted: int) -> int:
        """Go on from the beginning, and return what is wanted then; the length is known once an end was read up to."""
        if not self._next:
            raise TaskError(f"{type(self._source).__name__} yields no samples")
        is_end = self._next > self._first or not self._first  # else a jump went beyond it
        self._length = self._next if is_end else None
        kept = self._kept.copy()
        self._begin(0)
        if self._length is not None:  # the first sample follows the last one
            self._kept = kept
        return wanted if self._length is None else wanted % self._length

    def __getstate__(self) -> dict[str, Any]:
        # An iterator cannot be sent to a loading process; each begins its own.
        return {**self.__dict__, "_iterator": None, "_next": 0, "_kept": deque(maxlen=0), "_kept_end": 0}
