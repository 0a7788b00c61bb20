"""The factor on the loss in float16 training, which keeps small gradients from becoming zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_FIRST, _GROWTH, _BACKOFF, _INTERVAL = 2.0**16, 2.0, 0.5, 2000  # as torch.amp.GradScaler


class LossScale:
    """Scales as `torch.amp.GradScaler` does, but takes its verdict from the norm that the trainer has anyway.

    GradScaler walks through all gradients once more to find out whether they are finite, and asks the host to skip.

    Args:
        device: of the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), _FIRST, device=device)
        self._steps_since_change = torch.zeros((), dtype=torch.int32, device=device)

    def current(self) -> Tensor:
        """Return the factor that is in force, on the device."""
        return self.value

    def update(self, *, not_finite: Tensor) -> None:
        """Halve the scale after a step that was skipped, double it after 2,000 that were not; all on the device.

        Args:
            not_finite: 1 where the gradient was not finite, else 0; a float32 scalar.
        """
        torch._amp_update_scale_(self.value, self._steps_since_change, not_finite, _GROWTH, _BACKOFF, _INTERVAL)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold. Waits for the device."""
        return {"value": float(self.value), "steps_since_change": int(self._steps_since_change)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.value.fill_(state["value"])
        self._steps_since_change.fill_(state["steps_since_change"])
