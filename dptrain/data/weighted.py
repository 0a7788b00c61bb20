"""The order of samples that are drawn by weight, with replacement; like every order a function of position alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dptrain.data.stream import SampleStream
from dptrain.errors import ConfigError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)  # the two multipliers of the splitmix64 finaliser
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


class WeightedStream(SampleStream):
    """Draws the sample at each position independently, with a probability in proportion to its weight.

    The number drawn is a hash of (seed, position), so any part of the order can be read at any time by anyone, and the
    weights of a million samples cost one array.

    Args:
        weights: of each sample, at least 0 and finite; not all 0.
        seed: chooses the draws.

    Raises:
        ConfigError: where a weight is out of range.
    """

    def __init__(self, weights: Sequence[float] | Tensor, *, seed: int) -> None:
        values = np.asarray(weights, dtype=np.float64)
        super().__init__(len(values), seed=seed)
        if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or not values.sum():
            raise ConfigError("sample_weights must be one number of at least 0 for each sample, and not all 0")
        object.__setattr__(self, "_cumulative", np.cumsum(values) / values.sum())
        digest = hashlib.blake2b(f"dptrain weighted {seed}".encode(), digest_size=8).digest()
        object.__setattr__(self, "_key", np.uint64(int.from_bytes(digest, "little")))

    def indices(self, positions: NDArray[np.int64] | range) -> NDArray[np.int64]:
        """Return the dataset index at each absolute position."""
        bits = np.asarray(positions).astype(np.uint64) * _GOLDEN + self._key  # type: ignore[attr-defined] # set above
        bits = (bits ^ (bits >> np.uint64(30))) * _MULTIPLIER_1
        bits = (bits ^ (bits >> np.uint64(27))) * _MULTIPLIER_2
        uniform = ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        cumulative: NDArray[np.float64] = self._cumulative  # type: ignore[attr-defined] # set above
        found: NDArray[np.int64] = np.searchsorted(cumulative, uniform, side="right").astype(np.int64)
        return np.minimum(found, np.int64(self.num_samples - 1))
