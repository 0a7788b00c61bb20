"""A small vector that is summed over the replicas while training goes on, and read when somebody needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class PendingSum:
    """The sum over all replicas of one small vector, float64 or whole numbers, under way from construction on.

    Construction is a collective: all replicas must construct in the same order. It does not wait. Reading waits
    for the sum, and on a GPU for no work that was queued later. In one process without a process group the sum is
    the vector.

    Args:
        vector: this replica's part; must not be changed afterwards.
        group: the process group, or None for the default one.
        op: what the vectors of the replicas are combined by.
    """

    def __init__(
        self,
        vector: Tensor,
        *,
        group: dist.ProcessGroup | None = None,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    ) -> None:
        self._vector = vector
        self._work = (
            dist.all_reduce(vector, op=op, group=group, async_op=True)
            if dist.is_available() and dist.is_initialized()
            else None
        )
        self._copied = self._copy_aside() if vector.device.type == "cuda" else None

    def _copy_aside(self) -> torch.cuda.Event:
        """Bring the sum to the host in a stream of its own, so that reading it does not wait for the training."""
        device = self._vector.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # one of a pool
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            if self._work is not None:
                self._work.wait()
                self._work = None
            on_device = self._vector
            self._vector = torch.empty_like(on_device, device="cpu", pin_memory=True)
            self._vector.copy_(on_device, non_blocking=True)
            on_device.record_stream(stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return event

    def read(self) -> list[float]:
        """Wait and return the sum."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        values: list[float] = self._vector.tolist()  # whole numbers stay whole
        return values


def on_device(values: Sequence[float], *, device: torch.device) -> Tensor:
    """Return the values as a float64 vector on the device; on a GPU the copy is queued and the host goes on.

    `torch.tensor(values, device="cuda")` copies from pageable memory and waits for the whole queue. Pinned memory comes
    from torch's cache, which gives a block away again only after the copy has passed.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.float64, device=device)
    return torch.tensor(values, dtype=torch.float64, pin_memory=True).to(device, non_blocking=True)
