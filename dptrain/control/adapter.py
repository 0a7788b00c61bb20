"""The one loop "reading in, decision out": used by the trainer and by every integration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dptrain.control.base import Controller, Measurement
from dptrain.control.learning_rate import LearningRateRule
from dptrain.noise import NoiseScale


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The batch and the rate from the next step on.

    Attributes:
        global_batch_size: in samples.
        learning_rate_factor: by which the base rate is multiplied.
        reason: one sentence with the numbers that led here.
    """

    global_batch_size: int
    learning_rate_factor: float
    reason: str


class Adapter:
    """Asks a controller for the batch after each step, and a rule for the learning rate that goes with it.

    Args:
        controller: on its grid, so that it asks for batches that can run; one of the same kind may take its place.
        rule: how the learning rate follows the batch.
        reference_batch_size: batch that the base rate was tuned at, in samples.
    """

    def __init__(self, controller: Controller, *, rule: LearningRateRule, reference_batch_size: int) -> None:
        self.controller = controller
        self._rule = rule
        self._reference_batch_size = reference_batch_size
        self._state = controller.init()
        self._latest: tuple[NoiseScale, int, float] | None = None

    def learning_rate_factor(self, noise_scale: NoiseScale, *, batch: int) -> float:
        """Return the factor on the base rate for a batch."""
        # A reading is the same object until the next measured step, and a rule averages over ten quantiles of it.
        if self._latest is None or self._latest[0] is not noise_scale or self._latest[1] != batch:
            factor = self._rule(noise_scale, batch=batch, reference_batch=self._reference_batch_size)
            self._latest = noise_scale, batch, factor
        return self._latest[2]

    def decide(self, measurement: Measurement, *, allowed: Callable[[int], int] = lambda asked: asked) -> Adapted:
        """Ask the controller, and return what holds from the next step on.

        Args:
            measurement: equal on all ranks.
            allowed: from the batch that was asked for to the one that the loop can take: that of a decision on
                record, or the present one where the loop cannot change just now.
        """
        self._state, decision = self.controller.update(self._state, measurement)
        batch = allowed(round(decision.global_batch_size))
        factor = self.learning_rate_factor(measurement.noise_scale, batch=batch)
        return Adapted(global_batch_size=batch, learning_rate_factor=factor, reason=decision.reason)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as plain values."""
        return asdict(self._state)

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            CheckpointError: where it is that of another controller.
        """
        self._state = self.controller.restore(record)
