"""What an adaptive batch saves, estimated from the noise scale along a run; reads no run and fits nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dptrain.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True)
class AdaptiveSide:
    """What a run with a batch of its own at each step is worth beside runs of one fixed batch.

    Attributes:
        steps: S, that it took.
        samples: E, that it took.
        min_steps: S_min, that it would have taken without noise.
        min_samples: E_min, the fewest that its noise scale allows.
        product: (S/S_min − 1)(E/E_min − 1): 1 at any fixed batch, below 1 where adapting paid.
        gamma: the least that any choice of batches can make of the product.
    """

    steps: float
    samples: float
    min_steps: float
    min_samples: float
    product: float
    gamma: float

    @property
    def largest_saving(self) -> float:
        """Part of both steps and samples that the best adaptive batch saves against the best fixed one."""
        return (1 - math.sqrt(self.gamma)) / 2


def adaptive_side(
    *, noise_scales: ArrayLike, global_batch_sizes: ArrayLike, num_steps: ArrayLike = 1.0
) -> AdaptiveSide:
    """Place a run by its noise scale φ: a step of batch B advances by ds = 1/(1 + φ/B) of a step without noise.

    S_min = ∫ds, E_min = ∫φ ds, and γ = (∫√φ ds)²/(S_min·E_min), which a batch of √(r·φ) reaches at any exchange rate r
    (McCandlish et al. 2018, appendix D).

    Args:
        noise_scales: φ of each row, in samples.
        global_batch_sizes: B of each row, in samples.
        num_steps: that a row stands for, such as 0.3 for a last step that was needed in part.

    Raises:
        ConfigError: where a value is not finite or not positive.
    """
    scales, batches, steps = np.broadcast_arrays(
        *(np.asarray(values, dtype=np.float64) for values in (noise_scales, global_batch_sizes, num_steps))
    )
    for name, values in (("noise scales", scales), ("batches", batches), ("numbers of steps", steps)):
        if not (values.size and np.isfinite(values).all() and (values > 0).all()):
            raise ConfigError(f"{name} must be positive numbers, one for each step: leave out what is not resolved")
    progress = steps / (1 + scales / batches)
    min_steps, min_samples = float(progress.sum()), float((scales * progress).sum())
    total_steps, total_samples = float(steps.sum()), float((batches * steps).sum())
    return AdaptiveSide(
        steps=total_steps,
        samples=total_samples,
        min_steps=min_steps,
        min_samples=min_samples,
        product=(total_steps / min_steps - 1) * (total_samples / min_samples - 1),
        gamma=float((np.sqrt(scales) * progress).sum()) ** 2 / (min_steps * min_samples),
    )
