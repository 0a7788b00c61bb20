"""The law that reads the critical batch of a language model off its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptrain.control.base import Decision, Law, Measurement
from dptrain.errors import ConfigError

_TOKENS = 2e8
_EXPONENT = 4.76  # 1/0.21
_SMALLEST_LOSS, _LARGEST_LOSS = 1e-3, 100.0
"""Below is no language, above no vocabulary: a loss in another unit, or a run that has diverged."""


@dataclass(frozen=True, kw_only=True)
class KaplanLaw(Law):
    """B = 2e8/L^4.76 tokens, from the loss L in nats per token (Kaplan et al. 2020, arXiv 2001.08361, equation 1.4).

    A fit to transformers on WebText2 with the tokenizer of GPT-2, of batches that were critical by the trade-off
    between steps and samples; the authors found no dependence on the model's size beside that on the loss. With other
    data, or another tokenizer, the loss has another zero, and the fit need not hold: compare it with the noise scale.

    Attributes:
        tokens_per_sample: length of a sequence.
        ratio: batch over critical batch.
    """

    tokens_per_sample: int
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens_per_sample < 1:
            raise ConfigError(f"tokens_per_sample must be at least 1, got {self.tokens_per_sample}")
        if not self.ratio > 0:
            raise ConfigError(f"ratio (batch over critical batch) must be positive, got {self.ratio}")

    def decide(self, measurement: Measurement) -> Decision:
        """Ask for the critical batch at the smoothed training loss; for the present one where no loss is known."""
        loss, present = measurement.loss, measurement.global_batch_size
        if loss is None or not _SMALLEST_LOSS < loss < _LARGEST_LOSS:
            why = "no loss yet" if loss is None else f"a loss of {loss:.4g} is not in nats per token"
            return Decision(global_batch_size=present, reason=f"kept: {why}")
        tokens = critical_batch_tokens(loss)
        batch = max(self.ratio * tokens / self.tokens_per_sample, 1.0)
        reason = f"loss {loss:.4g} nats per token: critical batch size {tokens:.3g} tokens, {batch:.4g} samples"
        return Decision(global_batch_size=batch, reason=reason)


def critical_batch_tokens(loss: float) -> float:
    """Return Kaplan's critical batch at a loss in nats per token, in tokens."""
    return _TOKENS / math.pow(loss, _EXPONENT)
