"""Warns once where the learning rate may be too high for the batch; changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dptrain.noise import NoiseScale


@dataclass(frozen=True, kw_only=True)
class RateCheck:
    """Whether the learning rate may be too high for the batch: the loss has stopped falling at a small noise scale.

    SGD that bounces in a bowl of curvature h has φ = 2B/(εh) − B: below B where ε is above 1/h, within a factor of two
    of divergence, and far above it where the loss stands still because it has arrived.

    Attributes:
        patience_samples: samples without a lower loss after which the loss counts as standing still.
        lowest: lowest smoothed loss so far.
        since: position of that.
        has_warned: whether it was said; it is said once.
    """

    patience_samples: int
    lowest: float = math.inf
    since: int = 0
    has_warned: bool = False

    def after(
        self, noise_scale: NoiseScale, *, batch: int, samples_seen: int, loss: float | None
    ) -> tuple[RateCheck, str | None]:
        """Return the check after one more step, and the warning where it is due."""
        if loss is None or self.has_warned:
            return self, None
        if loss < self.lowest:
            return replace(self, lowest=loss, since=samples_seen), None
        upper = noise_scale.bounds(1.0)[1]
        if samples_seen - self.since < self.patience_samples or not upper < batch:
            return self, None
        warning = (
            f"learning rate may be too high for this batch size: noise scale at most {upper:.3g} at batch {batch}, "
            f"loss not below {self.lowest:.4g} for {samples_seen - self.since:,} samples"
        )
        return replace(self, has_warned=True), warning
