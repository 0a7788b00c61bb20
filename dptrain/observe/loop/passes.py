"""Counts the forward passes since the last step was closed, and says so where nobody closes one."""

from __future__ import annotations

from dptrain.observe.checks.reasons import DropLog

_CLEARED = 20
"""Times in a row that gradients are cleared before a step is closed. A GradScaler from 65,536 on skips 16 at most."""
_FIRST, _TIMES = 1000, 100
"""Forward passes in training mode without a closed step: before the first one, and in units of the longest step so far.
An evaluation may have any number, also where its author forgot `torch.no_grad()`."""

UNCLOSED = (
    "the meter's steps are not closed: call meter.step() once per optimizer step, after the last backward(), or attach "
    "again with the optimizer that steps now"
)


class ForwardPasses:
    """The forward passes of the step under way, measured or not.

    Args:
        log: where it is said once that no step is closed.
    """

    def __init__(self, log: DropLog) -> None:
        self._log = log
        self._num = 0
        self._num_training = 0
        self._longest = 0
        self._num_cleared = 0
        self._is_training = False  # since gradients were cleared last

    def __bool__(self) -> bool:
        return self._num > 0

    @property
    def num(self) -> int:
        """Passes since the last step was closed."""
        return self._num

    def add(self, *, training: bool) -> None:
        """Count a forward pass, in training or in evaluation mode."""
        self._num += 1
        self._num_training += training
        self._is_training |= training
        if self._num_training > (_TIMES * self._longest or _FIRST):
            self._log.unclosed(UNCLOSED)

    def clear(self) -> None:
        """Note that the gradients of the step were thrown away, so that it begins anew."""
        self._num_cleared += self._is_training
        self._is_training = False
        if self._num_cleared > _CLEARED:
            self._log.unclosed(UNCLOSED)

    def close(self) -> None:
        """Note that the step is closed."""
        self._longest = max(self._longest, self._num_training)
        self._num = self._num_training = self._num_cleared = 0
        self._log.unclosed(None)
