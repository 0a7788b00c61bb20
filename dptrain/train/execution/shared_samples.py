"""Samples that all replicas see in a step, read alike by each of them, whatever it trains on itself."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray

from dptrain.data.source import Batch, SlotSource
from dptrain.data.stream import SampleStream
from dptrain.data.window import Slot


@dataclass(frozen=True)
class SharedStream(SampleStream):
    """The order of shared samples: those of a step are drawn without replacement, by the seed and the step alone.

    Positions from step × num_drawn on are those of a step.

    Attributes:
        num_drawn: samples of a step, at most those of the dataset.
    """

    _: KW_ONLY
    num_drawn: int

    def indices(self, positions: NDArray[np.int64] | range) -> NDArray[np.int64]:
        """The dataset index at each position."""
        steps, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_drawn)
        indices = np.empty_like(places)
        for step in np.unique(steps).tolist():
            drawn = np.random.default_rng((self.seed, step)).choice(
                self.num_samples, size=self.num_drawn, replace=False
            )
            indices[steps == step] = drawn[places[steps == step]]
        return indices


def read_shared(source: SlotSource, step: int, *, num_drawn: int) -> Batch:
    """Return the shared samples of a step, collated: equal on all replicas, also where the dataset draws numbers.

    Args:
        source: of a `SharedStream`.
        step: number of the step.
        num_drawn: as of the stream.
    """
    _, batch = source[Slot(micro_step=0, rank=0, position=step * num_drawn, num_samples=num_drawn)]
    return batch
