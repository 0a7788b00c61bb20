"""A hook that measures nothing, for runs with measuring off."""

from __future__ import annotations

import torch
from torch import Tensor

from dptrain.observe.stopwatch import Stopwatch


class NullHook:
    """Registers no hook and returns zeros.

    Args:
        device: of the gradients.
        num_entries: groups, or 1 for the whole model.
    """

    name = "nothing"
    accumulated = False

    def __init__(self, device: torch.device, *, num_entries: int = 1) -> None:
        self.stopwatch = Stopwatch(device)
        self._zeros = torch.zeros(num_entries, dtype=torch.float64, device=device)

    def listen(self, *, on: bool) -> None:
        """Do nothing."""

    def begin(self, *, ignore: bool = False) -> bool:  # noqa: ARG002 - the interface of a hook
        """Do nothing."""
        return True

    def collect(self, weights: list[float]) -> Tensor:  # noqa: ARG002 - the interface of a hook
        """Return zeros."""
        return self._zeros

    def discard(self) -> None:
        """Do nothing."""

    def remove(self) -> None:
        """Do nothing."""
