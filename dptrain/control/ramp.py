"""The law that warms the batch up: from a first to a last one over the first samples, whatever is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dptrain.control.base import Decision, Law, Measurement
from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Ramp(Law):
    """A batch warm-up, as most large language models had one.

    Linear in GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix B); by doubling in OLMo's (Merrill et al. 2025, arXiv
    2505.23971) and Llama 3's (arXiv 2407.21783, section 3.4.1), at positions that `Schedule` takes one by one.

    Attributes:
        first: batch at the start, in samples.
        last: batch from the end of the warm-up on, in samples; it may be the smaller one.
        num_samples: length of the warm-up.
        shape: linear: grows by equal amounts over equal numbers of samples; doubling: doubles after equal numbers.
    """

    first: int
    last: int
    num_samples: int
    shape: Literal["linear", "doubling"] = "linear"

    def __post_init__(self) -> None:
        for name in ("first", "last", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} (of a batch warm-up) must be at least 1 sample, got {getattr(self, name)}")
        if self.shape not in ("linear", "doubling"):
            raise ConfigError(f"the shape of a batch warm-up must be linear or doubling, got {self.shape!r}")

    @classmethod
    def over_tokens(
        cls,
        *,
        first: int,
        last: int,
        num_tokens: int,
        tokens_per_sample: int,
        shape: Literal["linear", "doubling"] = "linear",
    ) -> Ramp:
        """Return the warm-up over a number of tokens; `first` and `last` still count samples."""
        if tokens_per_sample < 1:
            raise ConfigError(f"tokens_per_sample must be at least 1, got {tokens_per_sample}")
        return cls(first=first, last=last, num_samples=max(num_tokens // tokens_per_sample, 1), shape=shape)

    def decide(self, measurement: Measurement) -> Decision:
        """Ask for the batch at this position."""
        seen = measurement.samples_seen
        batch = self._batch(min(seen / self.num_samples, 1.0))
        reason = f"warm-up of the batch from {self.first} to {self.last}, {seen} of {self.num_samples} samples seen"
        return Decision(global_batch_size=batch, reason=f"{reason}: {batch:.4g}")

    def _batch(self, done: float) -> float:
        if done == 1:
            return self.last
        if self.shape == "linear":
            return self.first + done * (self.last - self.first)
        doublings = math.log2(self.last / self.first)
        return self.first * 2.0 ** math.trunc(done * doublings + math.copysign(1e-9, doublings))
