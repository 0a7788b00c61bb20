"""Seconds that measuring takes, by the host's clock or by pairs of events in a CUDA stream."""

from __future__ import annotations

import time
from collections import deque

import torch

_DISPATCH_S = 4e-6
"""What torch takes to call a Python hook in the midst of a backward pass, which the hook itself cannot time."""
_DRAIN_AT = 256
"""Pairs under way at which those that the device has passed are read: GPT-124M makes 150 in a backward pass."""


class Stopwatch:
    """Adds up the seconds between `start` and `stop`.

    On a CPU, where kernels run inside the call, by the host's clock. On CUDA by a pair of events in the stream, read
    only once the device has passed them: nothing waits, and the seconds come late. Events are used again, so that
    there are as many as the device has work queued for, whether `take` is called or not.

    Args:
        device: where the timed work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._drain_at = _DRAIN_AT

    def start(self) -> float | torch.cuda.Event:
        """Return what `stop` needs."""
        return self._recorded() if self._on_device else time.perf_counter()

    def stop(self, began: float | torch.cuda.Event) -> None:
        """Add the time since `began`."""
        if isinstance(began, float):
            self._seconds += time.perf_counter() - began + _DISPATCH_S
            return
        self._pairs.append((began, self._recorded()))
        if len(self._pairs) >= self._drain_at:
            self._drain()
            # Where the device is far behind, asking it again at each pair would cost a call each.
            self._drain_at = len(self._pairs) + _DRAIN_AT

    def take(self) -> float:
        """Return the seconds added up since the last call; device work that is not done yet counts next time."""
        self._drain()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @property
    def num_pending(self) -> int:
        """Pairs of events that the device has not passed, or that were not looked at yet."""
        return len(self._pairs)

    def _drain(self) -> None:
        """Read the pairs that the device has passed, and keep their events for later."""
        while self._pairs and self._pairs[0][1].query():  # type: ignore[no-untyped-call]
            first, last = self._pairs.popleft()
            self._seconds += first.elapsed_time(last) / 1000
            self._free += (first, last)

    def _recorded(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    @staticmethod
    def _new_event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
