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
        self._vector: Tensor | None = vector
        self._values: list[float] = []
        self._work = (
            dist.all_reduce(vector, group=group, async_op=True)
            if dist.is_available() and dist.is_initialized()
            else None
        )

    @classmethod
    def arrived(cls, values: list[float]) -> PendingSum:
        """Return one that was read before, such as by the process that wrote a checkpoint."""
        pending = cls.__new__(cls)
        pending._vector, pending._values, pending._work = None, list(values), None
        return pending

    def read(self) -> list[float]:
        """Wait and return the sum (synchronises the device the first time)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._vector is not None:
            self._values, self._vector = self._vector.tolist(), None
        return self._values
