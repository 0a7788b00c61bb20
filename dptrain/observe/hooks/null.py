"""A hook that sees nothing, for runs in which nothing is to be measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dptrain.observe.checks.gradient_checksum import GradientChecksum
from dptrain.observe.stopwatch import Stopwatch


class NullHook:
    """Stands where a hook is asked for, puts none anywhere, and returns zeros.

    Args:
        device: of the gradients.
        num_entries: groups, or 1 for the whole model.
    """

    name = "nothing"
    accumulated = False
    repeated = False
    outside = False
    squares = None

    def __init__(self, device: torch.device, *, num_entries: int = 1) -> None:
        self.stopwatch = Stopwatch(device)
        self._zeros = torch.zeros(num_entries, dtype=torch.float64, device=device)

    def listen(self, *, on: bool) -> None:
        """Do nothing."""

    def begin(self, *, ignore: bool = False) -> bool:  # noqa: ARG002 - a hook's form
        """Do nothing."""
        return True

    def check_with(self, checksum: GradientChecksum) -> None:
        """Do nothing."""

    def keep_first(self, note: Callable[[int, Tensor], None]) -> None:
        """Do nothing: no single micro-batch is seen here."""

    def end(self) -> bool:
        """Do nothing."""
        return True

    def collect(self, weights: list[float]) -> Tensor:  # noqa: ARG002 - a hook's form
        """Return zeros."""
        return self._zeros

    def discard(self) -> None:
        """Do nothing."""

    def remove(self) -> None:
        """Do nothing."""
