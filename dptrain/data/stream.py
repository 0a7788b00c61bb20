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


@functools.lru_cache(maxsize=8)
def _permutation(num_items: int, seed: int, epoch: int) -> KeyedPermutation:
    """Make a permutation once: its keys are a third of the cost of a small micro-batch's indices."""
    return KeyedPermutation(num_items, seed=seed, epoch=epoch)
