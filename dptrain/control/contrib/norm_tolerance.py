"""The law that keeps the noise of the gradient below a fraction of its size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptrain.control.noise_law import IntervalLaw
from dptrain.errors import ConfigError
from dptrain.noise.derived import norm_test_batch


@dataclass(frozen=True, kw_only=True)
class NormTestLaw(IntervalLaw):
    """B = φ/η²: the smallest batch that passes the norm test E‖g_B − G‖² ≤ η²·|G|².

    Byrd et al. 2012 (Mathematical Programming 134); for language models on many replicas Lau et al. 2024
    (arXiv 2412.21124). They test the gradient of a single step and never shrink the batch; this law acts on the
    interval of the smoothed noise scale, both ways. It is `NoiseLaw` with ratio 1/η², in the terms of that literature.

    Attributes:
        tolerance: η, standard deviation of the gradient over its size; 1 asks for a batch of one noise scale.
    """

    tolerance: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tolerance < math.inf:
            raise ConfigError(f"tolerance (of the norm test) must be positive, such as 0.5, got {self.tolerance}")

    def batch_for(self, noise_scale: float) -> float:
        """Return φ/η²."""
        return norm_test_batch(noise_scale, tolerance=self.tolerance)

    def noise_scale_for(self, batch: float) -> float:
        """Return B·η²."""
        return batch * self.tolerance**2
