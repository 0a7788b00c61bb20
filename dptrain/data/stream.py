"""The endless order of samples: which dataset index stands at each position; who fetches it is not known here."""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray

from dptrain.data.permutation import KeyedPermutation
from dptrain.errors import ConfigError


@dataclass(frozen=True)
class SampleStream:
    """Epoch after epoch of one dataset, as a single line of positions 0, 1, 2, … without end.

    The index at a position is a function of (seed, num_samples, position) and of nothing else, so any part of the line
    can be read at any time by anyone, and reading a…b, then b…c, is reading a…c.

    Attributes:
        num_samples: samples in the dataset, at least 1; positions p with equal p // num_samples form one epoch.
        seed: chooses the order; any whole number, the same on all replicas.
        shuffle: a fresh permutation for each epoch, or the dataset's own order in every epoch.
    """

    num_samples: int
    _: KW_ONLY
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"a stream needs a dataset with at least one sample, got {self.num_samples}")

    def epoch(self, position: int) -> int:
        """How many whole passes over the dataset lie before `position`."""
        return position // self.num_samples

    def window(self, position: int, num_samples: int) -> NDArray[np.int64]:
        """The dataset index at each of so many positions from one on, which may span epochs."""
        if not self.shuffle or type(self) is not SampleStream:  # another order has no permutation
            return self.indices(np.arange(position, position + num_samples))
        parts: list[NDArray[np.int64]] = []
        while num_samples > 0:
            epoch, offset = divmod(position, self.num_samples)
            number, within = divmod(offset, _BLOCK)
            part = _block(self.num_samples, self.seed, epoch, number)[within : within + num_samples]
            parts.append(part)
            position, num_samples = position + len(part), num_samples - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def indices(self, positions: NDArray[np.int64] | range) -> NDArray[np.int64]:
        """The dataset index at each absolute position.

        Args:
            positions: one-dimensional, from 0 on; they may span epochs, in any order.
        """
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        if not self.shuffle:
            return offsets
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            offsets[here] = _permutation(self.num_samples, self.seed, epoch)(offsets[here])
        return offsets


_BLOCK = 1024
"""Positions permuted at once. The rounds of the permutation cost 60 µs for one index as for a thousand."""


@functools.lru_cache(maxsize=16)
def _block(num_items: int, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
    """Return the indices of the positions number × 1,024 … of an epoch."""
    offsets = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, num_items))
    indices = _permutation(num_items, seed, epoch)(offsets)
    indices.flags.writeable = False  # handed out in parts
    return indices


@functools.lru_cache(maxsize=8)
def _permutation(num_items: int, seed: int, epoch: int) -> KeyedPermutation:
    """Make a permutation once: its keys are a third of the cost of a small micro-batch's indices."""
    return KeyedPermutation(num_items, seed=seed, epoch=epoch)
