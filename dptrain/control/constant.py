"""The law that never changes the batch."""

from __future__ import annotations

from dataclasses import dataclass

from dptrain.control.base import Decision, Law, Measurement
from dptrain.errors import ConfigError


@dataclass(frozen=True)
class Constant(Law):
    """One global batch from the first sample to the last.

    Attributes:
        global_batch_size: in samples.
    """

    global_batch_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"global_batch_size must be at least 1 sample, got {self.global_batch_size}")

    def decide(self, measurement: Measurement) -> Decision:  # noqa: ARG002 - a constant looks at nothing
        """Ask for the same batch, whatever was measured."""
        return Decision(global_batch_size=self.global_batch_size, reason=f"constant batch of {self.global_batch_size}")
