"""The interface of a hook: where a replica's own gradient is seen before it is combined with the others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from dptrain.observe.checks.gradient_checksum import GradientChecksum
from dptrain.observe.stopwatch import Stopwatch


class GradientHook(Protocol):
    """Sees this replica's own gradients and keeps nothing but squared norms. Never changes a gradient.

    Attributes:
        name: how the hook is named to a user.
        accumulated: True where it sees the sum over a replica's micro-batches once per step, False where it sees
            each micro-batch singly.
        stopwatch: counts the time that the hook takes.
    """

    name: str
    accumulated: bool
    stopwatch: Stopwatch

    repeated: bool
    """Whether an average came back into the replica's own gradient, by more than one reduction in the step."""

    @property
    def squares(self) -> Tensor | None:
        """Squared norms (micro-batches × groups) of the step collected last; None for less than two micro-batches."""

    @property
    def outside(self) -> bool:
        """Whether a gradient came since the last `collect` that belongs to no micro-batch."""

    def check_with(self, checksum: GradientChecksum) -> None:
        """Have `checksum` see each gradient too."""

    def listen(self, *, on: bool) -> None:
        """Look at the gradients from now on, or let go of them at no cost; a new hook looks."""

    def begin(self, *, ignore: bool = False) -> bool:
        """Say that the gradients seen from now on belong to a new micro-batch, or to none at all.

        Returns:
            False where the micro-batch begun before saw no gradient, so that this one takes its place.
        """

    def keep_first(self, note: Callable[[int, Tensor], None]) -> None:
        """Have `note` see the gradients of each step's first micro-batch, with the number of their parameter."""

    def end(self) -> bool:
        """Say that the step has no more micro-batches.

        Returns:
            False where the micro-batch begun last saw no gradient, so that it does not count.
        """

    def collect(self, weights: list[float]) -> Tensor:
        """Return Σ ‖seen‖²/v since the last call and forget it.

        Args:
            weights: the v of the micro-batches in the order in which they began.

        Returns:
            A float64 vector on the gradients' device, one entry for each group, or one for the whole model.

        Raises:
            ObservationError: where what was seen cannot be split into micro-batches.
        """

    def discard(self) -> None:
        """Forget what was seen since the last `collect`."""

    def remove(self) -> None:
        """Let go of the model."""
