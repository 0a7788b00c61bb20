"""A small vector that is summed over the replicas while training goes on, and read when somebody needs it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class PendingSum:
    """The sum over all replicas of one small float64 vector, under way from construction on.

    Construction is a collective: all replicas must construct in the same order. It does not wait. Reading waits
    for the sum and synchronises the device. In one process without a process group the sum is the vector.

    Args:
        vector: this replica's part; must not be changed afterwards.
        group: the process group, or None for the default one.
    """

    def __init__(self, vector: Tensor, *, group: dist.ProcessGroup | None = None) -> None:
        self._vector = vector
        self._work = (
            dist.all_reduce(vector, group=group, async_op=True)
            if dist.is_available() and dist.is_initialized()
            else None
        )

    def read(self) -> list[float]:
        """Wait and return the sum (synchronises the device the first time)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        values: list[float] = self._vector.tolist()
        return values
